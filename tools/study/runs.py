"""Run a study: one run after the other on this machine, or all as Slurm jobs."""

from collections.abc import Callable
from pathlib import Path

from cluster.chain import check_before_start, open_chain, run_chain
from cluster.local import LocalLauncher, retrying
from cluster.recipe_origin import write_origin
from cluster.site import Site, check_path
from cluster.slurm.submit import refuse_beside_jobs
from pipeline.errors import StageError
from pipeline.stage.outcome import Outcome, OutcomeKind
from tools.prepare.recipe_data import with_prepared_data
from tools.study.definition import STUDY_FILE, Study, StudyRun, study_runs, write_study

Print = Callable[[str], None]


def run_study(study: Study, directory: Path, processes: int, report: Print) -> Outcome:
    """Run what is not done yet. After a failed run the others still run; a stop or a lost rank ends the study.

    Raises:
        UserError: before anything starts, if a recipe, its data or its directory is refused.
    """
    chains = {}
    for run in study_runs(study, directory):
        chains[run] = with_prepared_data(study.chain(run.arm, run.seed), run.directory)
        check_before_start(chains[run], run.directory, processes)
        refuse_beside_jobs(run.directory.resolve(), chains[run].stages)
    opened = {}
    for run in _prepare(study, directory):
        opened[run] = open_chain(chains[run], run.directory)
        write_origin(run.directory, *study.origin(run.arm, run.seed))
    failed: list[str] = []
    with LocalLauncher(processes) as launcher:
        for number, (run, stages) in enumerate(opened.items(), 1):
            title = f"{number}/{len(opened)} {run.arm}, seed {run.seed}"
            if all(stage.done() for stage in stages):
                report(f"{title}: done before")
                continue
            report(f"{title}: {' > '.join(stage.recipe.name for stage in stages)}")
            outcome = run_chain(stages, retrying(launcher, report))
            if outcome.kind in (OutcomeKind.SAVED, OutcomeKind.BAD_NODE):
                return outcome
            if outcome.kind is not OutcomeKind.DONE:
                failed.append(f"{run.arm} with seed {run.seed}: {outcome.reason}")
                report(f"{title}: failed, {outcome.reason}")
    return Outcome(OutcomeKind.PERMANENT, "; ".join(failed)) if failed else Outcome(OutcomeKind.DONE)


def submit_study(study: Study, directory: Path, site: Site, report: Print) -> None:
    """Submit what is neither done nor queued; everything is checked before the first job is queued.

    Raises:
        UserError: if a recipe, its data, the directory or Slurm refuses.
    """
    from cluster.slurm import submit as jobs
    from cluster.slurm.code_snapshot import code_snapshot_path, take_code_snapshot

    check_path(directory)
    planned, warnings = {}, {}
    for run in study_runs(study, directory):
        cache = Path(site.data_cache) if site.data_cache else None
        chain = with_prepared_data(study.chain(run.arm, run.seed), run.directory, cache=cache)
        planned[run] = chain, jobs.plan_jobs(chain, run.directory, site)
        warnings |= {need.warning: run.arm for need in jobs.check_planned(planned[run][1]).values() if need.warning}
    for warning, arm in warnings.items():
        report(f"{arm} {warning}")
    first = next(iter(planned.values()))[1]  # one arm is enough, because Slurm refuses all or none
    jobs.check_with_slurm(first, code_snapshot_path(directory))
    _prepare(study, directory)
    code = take_code_snapshot(directory)  # one for all runs, so that numba compiles once
    for run, (chain, plan) in planned.items():
        title = f"{run.arm} {run.seed}"
        jobs.submit_planned(chain, run.directory, site, plan, lambda line, title=title: report(f"{title} {line}"), code)
        write_origin(run.directory, *study.origin(run.arm, run.seed))


def _prepare(study: Study, directory: Path) -> list[StudyRun]:
    try:
        write_study(study, directory / STUDY_FILE)
    except OSError as error:
        raise StageError(f"--out {directory} cannot be written ({error.strerror}); choose another directory") from None
    return list(study_runs(study, directory))
