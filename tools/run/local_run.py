"""Train a chain on this machine: open its run directory, run its stages with a display, and say how it ended."""

import importlib.util
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from cluster.chain import check_before_data, check_before_start, hold_run, open_chain, run_chain
from cluster.local import LocalLauncher, retrying
from cluster.recipe_origin import write_origin
from cluster.show.progress import Progress
from cluster.show.status import RunFollower
from cluster.show.status_table import run_table
from cluster.slurm.submit import refuse_beside_jobs
from pipeline.errors import DataError, UserError
from pipeline.recipe import ChainRecipe
from pipeline.stage.outcome import OutcomeKind
from pipeline.storage.working_copy import Mirror, is_mirrored_run_file, remote_of
from tools.tables import wide_console

REMEDIES = {
    OutcomeKind.SAVED: "everything is saved, the same command resumes it",
    OutcomeKind.BAD_NODE: "the same command resumes from the last checkpoint",
}


def train_here(chain: ChainRecipe, directory: Path, recipe: Path, overrides: Sequence[str], processes: int) -> None:
    """Run the stages of a chain that are not done.

    Args:
        directory: the run directory, or the working copy of a remote one.
        recipe: the file that the chain was read from; also `overrides`, the changes to it.

    Raises:
        UserError: if the run is refused or fails.
        typer.Exit: with the outcome's exit code, if the same command resumes the run.
    """
    check_without_data(chain, directory, processes)
    check_before_start(chain, directory, processes)
    stages = open_chain(chain, directory)
    write_origin(directory, recipe, overrides)
    remote = remote_of(directory)
    run_files = Mirror(directory, remote, is_mirrored_run_file) if remote else None  # each stage uploads its own files
    if run_files:
        run_files.push()
    console = wide_console()
    with (
        hold_run(directory),
        Progress(directory, console) as progress,
        LocalLauncher(processes, progress.update) as launcher,
    ):
        outcome = run_chain(stages, retrying(launcher, progress.say))
    if run_files:
        run_files.push()
    if remedy := REMEDIES.get(outcome.kind):
        print(f"fcmae: {outcome.reason}; {remedy}", file=sys.stderr)
        raise typer.Exit(outcome.kind.exit_code)
    if outcome.kind is not OutcomeKind.DONE:
        raise UserError(outcome.reason)
    console.print(run_table(RunFollower(directory).statuses()))


def next_commands(chain: ChainRecipe, out: str) -> list[str]:
    """Return what to try with the segmenter or detector that a run has trained; nothing after other runs."""
    stage, run = list(chain.stages.values())[-1], shlex.quote(out)
    if stage.objective.kind not in ("segmentation", "detection"):
        return []
    commands = [f"fcmae predict {run} PHOTOS --out DIR"]
    if stage.data.validation:
        commands.append(f"fcmae evaluate {run} --data {shlex.quote(stage.data.validation)} --per-class")
    return commands


def check_without_data(chain: ChainRecipe, directory: Path, processes: int) -> None:
    """Refuse what needs no data to be refused, before its images are prepared for hours.

    Raises:
        UserError: for the first defect.
    """
    if importlib.util.find_spec("ffcv") is None:
        raise DataError("FFCV is not installed, and training reads .beton files with it; `fcmae doctor` says more")
    check_before_data(chain, directory, processes)
    refuse_beside_jobs(directory.resolve(), chain.stages)


@contextmanager
def stoppable_preparation() -> Iterator[None]:
    """Turn Ctrl-C during a preparation into the exit code of what was stopped and saved."""
    try:
        yield
    except KeyboardInterrupt:
        print("fcmae: stopped while preparing images; the same command continues", file=sys.stderr)
        raise typer.Exit(OutcomeKind.SAVED.exit_code) from None
