"""Run a study: one run after the other on this machine, or all as Slurm jobs."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.chain import check_before_data, check_before_start, resolve_chain_paths, run_chain
from cluster.local import LocalLauncher, retrying
from cluster.recipe_origin import write_origin
from cluster.site import Site, check_path
from cluster.slurm import submit as jobs
from cluster.slurm.ticket import SubmissionLostError
from pipeline.errors import OffTrackError, StageError
from pipeline.recipe import ChainRecipe, StageRecipe
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import RECIPE_FILE
from tools.prepare.recipe_data import refuse_sources, sources_of, with_prepared_data
from tools.rehearse.chain_rehearsal import refuse_failing_stages
from tools.study.definition import STUDY_FILE, Study, StudyRun, refuse_another_study, study_runs, write_study
from tools.study.shared_stages import SharedStages, is_same_experiment, owner_of

Print = Callable[[str], None]
LOOK_AGAIN_SECONDS = 2.0


def run_study(study: Study, directory: Path, processes: int, report: Print) -> Outcome:
    """Run what is not done yet. After a failed run the others still run, unless the study is a ladder; a stop or a lost
    rank ends the study. A run whose next stage another command is training comes later, or is waited for.

    Raises:
        UserError: before anything starts, if a recipe, its data or its directory is refused.
        OffTrackError: if a rung of a ladder is off track.
    """
    chains = checked_chains(study, directory, processes)
    shared, opened = _prepare(study, directory), {}
    for run, chain in chains.items():
        opened[run] = _open_run(shared, study, run, chain, report)
    with LocalLauncher(processes) as launcher:
        return _train_all(opened, launcher, study.ladder, report)


def checked_chains(
    study: Study, directory: Path, processes: int, *, dry_run: bool = False
) -> dict[StudyRun, ChainRecipe]:
    """The recipe of each run, once everything that can be refused without making anything has been checked.

    Args:
        dry_run: refuse data that would have to be prepared.

    Raises:
        UserError: for the first defect.
    """
    refuse_another_study(study, directory)
    chains = {run: study.chain(run.arm, run.seed) for run in study_runs(study, directory)}
    for run, chain in chains.items():  # all runs, before the images of the first one are prepared for hours
        if dry_run:
            refuse_sources(chain, run.directory)
        check_before_data(chain, run.directory, processes, beside=True)
    for run, chain in chains.items():
        chains[run] = with_prepared_data(chain, run.directory)
        check_before_start(chains[run], run.directory, processes, beside=True)
        jobs.refuse_beside_jobs(run.directory.resolve(), chains[run].stages)
    return chains


def _train_all(opened: Mapping[StudyRun, list[Stage]], launcher: LocalLauncher, ladder: bool, report: Print) -> Outcome:
    opened_as = {stage.directory: stage.recipe for stages in opened.values() for stage in stages}
    launch, failed, later = _sharing(retrying(launcher, report), opened_as), [], set()
    left = dict(enumerate(opened.items(), 1))
    while left:
        before = len(left)
        for number, (run, stages) in list(left.items()):
            title = f"{number}/{len(opened)} {run.arm}, seed {run.seed}"
            if all(stage.done() for stage in stages):
                report(f"{title}: done before")
            try:
                outcome = run_chain(stages, lambda stage, title=title: launch(stage, title, report))
            except StageError as error:  # another command trains it
                if number not in later:
                    report(f"{title}: later, {error}")
                    later.add(number)
                if ladder:
                    break
                continue
            except OffTrackError as error:
                if ladder:
                    raise
                outcome = Outcome(OutcomeKind.PERMANENT, str(error))
            if outcome.kind in (OutcomeKind.SAVED, OutcomeKind.BAD_NODE):
                return outcome
            del left[number]
            if outcome.kind is not OutcomeKind.DONE:
                failed.append(f"{run.arm} with seed {run.seed}: {outcome.reason}")
                report(f"{title}: failed, {outcome.reason}")
                if ladder:
                    left.clear()
                    break
        if len(left) == before:  # other commands train all that is left
            if launcher.stopped:
                return Outcome(OutcomeKind.SAVED, "stopped while other commands train what is left")
            time.sleep(LOOK_AGAIN_SECONDS)
    return Outcome(OutcomeKind.PERMANENT, "; ".join(failed)) if failed else Outcome(OutcomeKind.DONE)


def _sharing(
    launch: Callable[[Path], Outcome], opened_as: Mapping[Path, StageRecipe]
) -> Callable[[Path, str, Print], Outcome]:
    """Return what runs a stage that other runs and other commands may share: a stage that has failed is not tried
    again, and StageError is raised while another command trains it.

    Args:
        opened_as: the recipe of each stage. A stage that has another one now is not trained.
    """
    failed: dict[Path, Outcome] = {}

    def train(directory: Path, title: str, report: Print) -> Outcome:
        if not (directory / RECIPE_FILE).exists():
            return Outcome(OutcomeKind.PERMANENT, f"{directory} was removed meanwhile; the same command trains it anew")
        stage = Stage(directory)
        if not is_same_experiment(stage.recipe, opened_as[directory]):
            return Outcome(
                OutcomeKind.PERMANENT,
                f"another command made {directory} anew with another recipe; the same command trains this run's own",
            )
        stage.attempts.check_free()
        if directory not in failed:
            report(f"{title}: {directory.name}")
            outcome = launch(directory)
            if outcome.kind is not OutcomeKind.PERMANENT:
                return outcome
            stage.attempts.check_free()  # another command may have been faster
            if done := stage.done():
                return Outcome(OutcomeKind.DONE, step=done.step)
            failed[directory] = outcome
        return failed[directory]

    return train


def _open_run(
    shared: SharedStages, study: Study, run: StudyRun, chain: ChainRecipe, report: Print, *, bound: bool = False
) -> list[Stage]:
    """Make or reopen a run, and say which of its stages another run trains from now on."""
    linked = {name for name in chain.stages if owner_of(run.directory / name)}
    stages = shared.open_run(chain, run.directory, bound=bound)
    for name in chain.stages:
        if name not in linked and (owner := owner_of(run.directory / name)):
            report(f"{run.arm} {run.seed} {name}: that of {_short(owner)}")
    write_origin(run.directory, *study.origin(run.arm, run.seed))
    return stages


def _short(run: Path) -> str:
    """ARM/seed-N of a run of the same study or another."""
    return "/".join(run.parts[-2:])


def plan_submission(
    study: Study, directory: Path, site: Site, report: Print, *, dry_run: bool = False
) -> dict[StudyRun, tuple[ChainRecipe, list[jobs.PlannedStage]]]:
    """The recipe and the planned stages of each run, once everything that can be refused has been checked.

    Args:
        dry_run: do not ask Slurm, and refuse data that would have to be prepared.

    Raises:
        UserError: for the first defect.
    """
    from cluster.slurm.code_snapshot import code_snapshot_path

    check_path(directory)
    refuse_another_study(study, directory)
    cache = Path(site.data_cache) if site.data_cache else None
    planned, warnings = {}, {}
    # All recipes, before the images of the first one are prepared for hours.
    chains = {run: study.chain(run.arm, run.seed) for run in study_runs(study, directory)}
    first, chain = next(iter(chains.items()))
    if not dry_run and sources_of(resolve_chain_paths(chain), first.directory):
        jobs.check_without_data(chain, first.directory, site, code_snapshot_path(directory))
    for run, chain in chains.items():
        if dry_run:
            refuse_sources(chain, run.directory)
        chain = with_prepared_data(chain, run.directory, cache=cache)
        planned[run] = chain, jobs.plan_jobs(chain, run.directory, site, ask_slurm=not dry_run)
        warnings |= {need.warning: run.arm for need in jobs.check_planned(planned[run][1]).values() if need.warning}
    for warning, arm in warnings.items():
        report(f"{arm} {warning}")
    return planned


def submit_study(study: Study, directory: Path, site: Site, report: Print, *, rehearsal: bool = True) -> None:
    """Submit what is neither done nor queued; everything is checked before the first job is queued.

    A stage that several runs share has one job, and the next stages of all of them wait for it. In a ladder the first
    job of a rung waits for the last one of the rung before.

    Args:
        rehearsal: first play a rank of each stage that gets GPUs; equal stages of arms and seeds once.

    Raises:
        UserError: if a recipe, its data, the directory, Slurm or a rehearsal refuses.
        OffTrackError: if a finished rung of a ladder is off track.
    """
    from cluster.slurm.code_snapshot import code_snapshot_path, take_code_snapshot

    planned = plan_submission(study, directory, site, report)
    first = next(iter(planned.values()))[1]  # one arm is enough, because Slurm refuses all or none
    jobs.check_with_slurm(first, code_snapshot_path(directory))
    if rehearsal:
        arms = {
            f"study {study.name}, {run.arm} with seed {run.seed}: ": [item.recipe for item in plan if item.needs_job]
            for run, (_, plan) in planned.items()
        }
        refuse_failing_stages(arms, site)
    shared = _prepare(study, directory)
    for run, (chain, plan) in planned.items():
        _open_run(shared, study, run, chain, report, bound=any(stage.job for stage in plan))
    code = take_code_snapshot(directory)  # one for all runs, so that numba compiles once
    before: dict[int, str | None] = {}  # of a ladder, the last job of the rung before, by seed
    for run, (chain, _) in planned.items():
        last = _submit_run(chain, run, site, code, before.get(run.seed), report)
        if study.ladder:
            before[run.seed] = last


def _submit_run(
    chain: ChainRecipe, run: StudyRun, site: Site, code: Path, after: str | None, report: Print
) -> str | None:
    """Submit what a run needs now that the runs before it have their jobs; the job of its last stage, if it has one."""
    title = f"{run.arm} {run.seed}"
    for last_try in (False, False, True):
        planned = jobs.plan_jobs(chain, run.directory, site)
        try:
            ids = jobs.submit_planned(
                chain, run.directory, site, planned, lambda line: report(f"{title} {line}"), code, after
            )
        except SubmissionLostError as lost:
            if last_try or lost.cancelled:
                raise
            report(f"{title} {lost}")  # the next plan shows the jobs of the winner
        else:
            return ids.get(list(chain.stages)[-1])
    raise AssertionError("unreachable")


def _prepare(study: Study, directory: Path) -> SharedStages:
    try:
        for run in study_runs(study, directory):  # first, because another command keeps what has a directory
            run.directory.mkdir(parents=True, exist_ok=True)
        write_study(study, directory / STUDY_FILE)
        return SharedStages(directory)
    except OSError as error:
        raise StageError(f"--out {directory} cannot be written ({error.strerror}); choose another directory") from None
