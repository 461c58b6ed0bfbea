"""Run or resume one stage as one rank: `python -P -m pipeline.run DIRECTORY`. The directory says everything else."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Timer

import torch

from pipeline.data.decode import compile_decoder
from pipeline.data.object_views import compile_objects
from pipeline.data.scenes import compile_scenes
from pipeline.distributed.agreement import AgreedStop, Agreement
from pipeline.distributed.processes import LAUNCHER_PID, die_with_parent, keep_imports_safe
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from pipeline.errors import UserError
from pipeline.health.sentinel import run_sentinel
from pipeline.health.watchdog import PATIENCE, Watchdog
from pipeline.objectives.region_loops import compile_regions
from pipeline.recipe import DetectionSettings, SegmentationSettings
from pipeline.stage.device_errors import device_error
from pipeline.stage.directory import Stage
from pipeline.stage.environment import program_id
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import HEALTH_FOLDER
from pipeline.storage.user_cache import keep_compiled_code_local, redirect_caches
from pipeline.tracking.startup import startup
from pipeline.training.failures import classify_error, exit_rank, is_explained
from pipeline.training.trainer import Training
from pipeline.url_secrets import redact, redact_tracebacks


def run_stage(directory: Path) -> Outcome:
    """Run the stage to its end, or until a signal asks for a stop. One call per rank (see `World.join`).

    Returns when the outcome is recorded in the stage directory. User errors are a permanent outcome, a lost rank or
    machine a bad node's; any other exception is recorded as permanent and raised. If the stage stands still, a thread
    of every rank that still runs ends the process, because `run_stage` cannot return then.
    """
    request = StopRequest().install()
    keep_imports_safe()
    redirect_caches()
    keep_compiled_code_local()
    startup.lap("imports")
    try:
        stage = Stage(directory)
    except UserError as error:
        return Outcome(OutcomeKind.PERMANENT, str(error))
    if done := stage.done():
        return Outcome(OutcomeKind.DONE, step=done.step)
    try:
        outcome = _train(stage, request)
    except BaseException as error:
        outcome = classify_error(error)
        with suppress(OSError):  # a full disk may be the error
            stage.attempts.record(outcome)
            if defect := device_error(error):
                stage.attempts.record_device_error(replace(defect, program=program_id(stage.directory)))
        if outcome.kind is OutcomeKind.PERMANENT and not is_explained(error):
            raise
        return outcome
    stage.attempts.record(outcome)
    return outcome


def _train(stage: Stage, request: StopRequest) -> Outcome:
    """Join the other ranks, claim the stage, and train it."""
    recipe, stall_seconds = stage.recipe, stage.recipe.health.stall_seconds
    compile_decoder()  # before the ranks meet, so that no time-out counts it
    if isinstance(recipe.objective, SegmentationSettings):
        compile_scenes(recipe.objective.classes)
    if isinstance(recipe.objective, DetectionSettings):
        compile_objects()
        compile_regions(double=recipe.engine.precision == "fp64")
    startup.lap("compile")
    with ExitStack() as stack:
        # Collectives time out later than the watchdog acts, because the watchdog can say which rank is to blame.
        group_seconds = 1.5 * PATIENCE * stall_seconds
        # There is no watchdog yet, and NCCL has no time-out at its start.
        with _bounded(group_seconds + stall_seconds):
            world = World.join(recipe.engine.device, recipe.engine.threads, group_seconds)
        stack.push(lambda kind, error, trace: world.leave(broken=error is not None))
        recipe.check_world_size(world.size)
        threads = recipe.engine.threads or world.threads(world.on_main(lambda: stage.attempts.last_threads(world.size)))
        torch.set_num_threads(threads)
        stage.attempts.own = world.on_main(lambda: stage.attempts.claim(world.size, threads))
        watchdog = stack.enter_context(_watchdog(stage, world))
        # Later than the other ranks notice and than a stuck rank needs to write its stacks.
        sentinel = run_sentinel(stage.directory, stage.attempts.own, watchdog.beat_file, 2 * stall_seconds)
        stack.enter_context(sentinel)
        if world.is_main:
            stack.enter_context(stage.attempts.heartbeat())
        agreement = Agreement.among(world)
        stack.push(lambda kind, error, trace: agreement.close(wait=error is None))
        stop = AgreedStop(request, agreement, watchdog.meeting)
        startup.lap("group")
        training = stack.enter_context(Training.assemble(stage, world, watchdog, stop))
        if training is None:
            return Outcome(OutcomeKind.SAVED, f"stopped by {stop.reason}")
        outcome = training.run()
        training.finish(outcome)
        return outcome


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer."""

    def give_up() -> None:
        sentence = f"the ranks have not met after {seconds / 60:.0f} minutes; look at the network between the nodes"
        print(sentence, file=sys.stderr)
        exit_rank(Outcome(OutcomeKind.BAD_NODE, sentence))

    timer = Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watchdog(stage: Stage, world: World) -> Watchdog:
    def end(sentence: str, step: int) -> None:
        outcome = Outcome(OutcomeKind.BAD_NODE, sentence, step)
        print(sentence, file=sys.stderr)
        with suppress(Exception):  # the process must end even if the stage's disk fails
            stage.attempts.record(outcome)
            outcome = stage.attempts.last_outcome() or outcome
        exit_rank(outcome)

    directory = stage.directory / HEALTH_FOLDER / f"{stage.attempts.own:06d}"
    return Watchdog(directory, world.rank, world.size, stage.recipe.health.stall_seconds, end)


def main() -> None:
    """Run one rank of a stage as a process, and print the reason of a failure to stderr."""
    redact_tracebacks()
    die_with_parent(int(os.environ.get(LAUNCHER_PID, 0)))
    try:
        outcome = run_stage(Path(sys.argv[1]))
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr)
        outcome = Outcome(OutcomeKind.PERMANENT)
    if outcome.kind in (OutcomeKind.PERMANENT, OutcomeKind.BAD_NODE) and outcome.reason:
        print(outcome.reason, file=sys.stderr)
    exit_rank(outcome)


if __name__ == "__main__":
    main()
