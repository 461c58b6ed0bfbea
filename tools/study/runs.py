"""The runs of a study: one after the other here, or all as jobs of Slurm."""

from collections.abc import Callable
from pathlib import Path

from cluster.chain import check_before_start, open_chain, resolve_chain_paths, run_chain
from cluster.local import LocalLauncher
from cluster.recipe_origin import write_origin
from cluster.site import Site, check_path
from pipeline.errors import StageError
from pipeline.stage.outcome import Outcome, OutcomeKind
from tools.study.definition import Cell, Study, cells, dump_study

STUDY = "study.yaml"
Report = Callable[[str], None]


def run_study(study: Study, directory: Path, processes: int, report: Report) -> Outcome:
    """Run what is not done yet. An arm that fails keeps none from running; a stop, or a lost rank, ends the study.

    Raises:
        UserError: before anything starts, if a recipe, its data or its directory is refused.
    """
    planned = _prepared(study, directory)
    opened = {cell: open_chain(study.chain(cell.arm, cell.seed), cell.directory) for cell in planned}
    for cell, stages in opened.items():
        write_origin(cell.directory, *study.origin(cell.arm, cell.seed))
        check_before_start(stages, processes)
    failed: list[str] = []
    with LocalLauncher(processes) as launcher:
        for number, (cell, stages) in enumerate(opened.items(), 1):
            told = f"{number}/{len(opened)} {cell.arm}, seed {cell.seed}"
            if all(stage.done() for stage in stages):
                report(f"{told}: done before")
                continue
            report(f"{told}: {' > '.join(stage.recipe.name for stage in stages)}")
            outcome = run_chain(stages, launcher.run)
            if outcome.kind in (OutcomeKind.SAVED, OutcomeKind.BAD_NODE):
                return outcome
            if outcome.kind is not OutcomeKind.DONE:
                failed.append(f"{cell.arm} with seed {cell.seed}: {outcome.reason}")
                report(f"{told}: failed, {outcome.reason}")
    if failed:
        return Outcome(OutcomeKind.PERMANENT, "; ".join(failed))
    return Outcome(OutcomeKind.DONE)


def submit_study(study: Study, directory: Path, site: Site, report: Report) -> None:
    """Submit what is neither done nor on its way; everything is checked before the first job is queued.

    Raises:
        UserError: the first thing that is refused.
    """
    from cluster.slurm import submit as jobs
    from cluster.slurm.code_snapshot import code_snapshot_path, take_code_snapshot

    check_path(directory)
    planned, warnings = {}, {}
    for cell in _prepared(study, directory):
        chain = resolve_chain_paths(study.chain(cell.arm, cell.seed))
        planned[cell] = chain, jobs.plan_jobs(chain, cell.directory, site)
        warnings |= {found.warning: cell for found in jobs.check_planned(planned[cell][1]).values() if found.warning}
    for warning, cell in warnings.items():
        report(f"{cell.arm} {warning}")
    # What Slurm refuses, it refuses of all arms alike.
    first = next(iter(planned.values()))[1]
    jobs.check_with_slurm(first, code_snapshot_path(directory))
    code = take_code_snapshot(directory)  # for all of them, so that what numba compiles is compiled once
    for cell, (chain, plan) in planned.items():
        told = f"{cell.arm} {cell.seed}"
        jobs.submit_planned(chain, cell.directory, site, plan, lambda said, told=told: report(f"{told} {said}"), code)
        write_origin(cell.directory, *study.origin(cell.arm, cell.seed))


def _prepared(study: Study, directory: Path) -> list[Cell]:
    try:
        dump_study(study, directory / STUDY)
    except OSError as error:
        raise StageError(f"--out {directory} cannot be written ({error.strerror}); choose another directory") from None
    return list(cells(study, directory))
