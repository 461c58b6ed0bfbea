"""Run or resume one stage, given nothing but its directory: `python -m pipeline.run DIRECTORY`, one process a rank."""

import math
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch

from pipeline.checkpoint.store import CheckpointStore
from pipeline.data.batch import example_batch
from pipeline.data.feed import TrainFeed
from pipeline.data.open import evaluation_feed, open_stage_data, train_feed
from pipeline.distributed.processes import LAUNCHER_PID, die_with_parent
from pipeline.distributed.stop import AgreedStop, StopRequest
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.engines.large_kernel_choice import set_large_kernels
from pipeline.errors import UserError
from pipeline.health import sentinel
from pipeline.health.watchdog import PATIENCE, Watchdog
from pipeline.objectives import Objective, create_objective
from pipeline.optim.schedule import learning_rate
from pipeline.randomness import text_key
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import CURVES_FILE, HEALTH_FOLDER, JOURNAL_FILE
from pipeline.tracking import journal, pictures
from pipeline.tracking.startup import startup
from pipeline.tracking.step_log import StepLog
from pipeline.training import handoff, records
from pipeline.training.actions import Actions
from pipeline.training.failures import explaining_lost_peers, failure, is_full_disk, is_out_of_memory, leave
from pipeline.training.initial_sparsity import start_sparsity
from pipeline.training.rollback import Rollbacks
from pipeline.training.saving import Checkpoints, best_evaluation, open_store
from pipeline.training.step_guard import Guard
from pipeline.training.trainer import train


def run_stage(directory: Path, leave: Callable[[Outcome], None] = leave) -> Outcome:
    """Run the stage to its end, or until a signal asks for a stop. One call per rank (see `World.join`).

    Returns once the outcome is in the stage directory. User errors become a permanent outcome, a lost rank or machine
    a bad node's; any other exception is noted as permanent and raised. When the stage stands still nobody can return:
    `leave` is then called on every rank that still runs, in a thread, with the outcome, and must end the process.
    """
    request = StopRequest().install()
    startup.lap("imports")
    try:
        stage = Stage(directory)
    except UserError as error:
        return Outcome(OutcomeKind.PERMANENT, str(error))
    if done := stage.done():
        return Outcome(OutcomeKind.DONE, step=done.step)
    try:
        with ExitStack() as stack:
            outcome = _run(stage, request, stack, leave)
    except BaseException as error:
        outcome = failure(error)
        with suppress(OSError):  # the disk may be what has failed
            stage.attempts.record(outcome)
        told = isinstance(error, UserError) or is_out_of_memory(error) or is_full_disk(error)
        if outcome.kind is OutcomeKind.PERMANENT and not told:
            raise
        return outcome
    stage.attempts.record(outcome)
    return outcome


def _run(stage: Stage, request: StopRequest, stack: ExitStack, leave: Callable[[Outcome], None]) -> Outcome:
    recipe = stage.recipe
    # The watchdog knows more than a collective that has waited long enough, so it comes first.
    patience_seconds = 1.5 * PATIENCE * recipe.health.stall_seconds
    world = World.join(recipe.engine.device, recipe.engine.threads, patience_seconds)
    stack.push(lambda kind, error, trace: world.leave(broken=error is not None))
    recipe.check_world_size(world.size)
    threads = recipe.engine.threads or world.threads(world.on_main(lambda: stage.attempts.last_threads(world.size)))
    torch.set_num_threads(threads)
    stage.attempts.own = world.on_main(lambda: stage.attempts.claim(world.size, threads))
    watchdog = stack.enter_context(_watchdog(stage, world, leave))
    # Later than other ranks would notice, and than the stuck one has written its stacks.
    silent_seconds = 2 * recipe.health.stall_seconds
    stack.enter_context(sentinel.run_sentinel(stage.directory, stage.attempts.own, watchdog.beat_file, silent_seconds))
    if world.is_main:
        stack.enter_context(stage.attempts.heartbeat())
    stop = AgreedStop(request, watchdog.meeting(world.agree))
    startup.lap("group")
    data = open_stage_data(recipe, world, stop, stack)
    if data is None:
        return Outcome(OutcomeKind.SAVED, f"stopped by {stop.reason}")
    identity = {name: part.beton.sha256 for name, part in data.items()}
    world.on_main(lambda: stage.pin_data(identity))
    startup.lap("data")
    log_file = records.open_journal(stage, world, stop, stack)
    stack.push(explaining_lost_peers(stage, watchdog))
    log = StepLog(log_file, world.sum, recipe.tracking.log_every_steps, recipe.batch.global_batch)

    seed = text_key(recipe.seed, recipe.name)
    objective = create_objective(recipe, seed)
    engine = create_engine(objective.build_model, recipe, world)
    if forms := set_large_kernels(stage.directory, engine, objective):
        log.write("large_kernels", forms=forms)
    workers = recipe.data.workers or max(world.cores() - 1, 1)
    feed = train_feed(recipe, data["train"], seed, world, workers)
    stack.callback(feed.close)
    validation = evaluation_feed(recipe, data["validation"], world, workers) if "validation" in data else None
    startup.lap("model")
    facts = {
        "recipe": recipe.fingerprint(),
        "data": identity,
        "engine": recipe.engine.kind,
        "versions": records.versions(),
    }
    store = open_store(stage, world, facts, lambda message: log.write("event", level="warning", message=message))
    classes = data["train"].classes
    last = math.ceil(recipe.schedule.epochs * feed.steps_per_epoch)
    start, resumed = _load(stage, engine, objective, store, log, classes, feed, last)
    guard: Guard = engine.guard
    startup.lap("weights")
    records.write_attempt(log_file, recipe, data, world, step=start, total_steps=last)
    engine.warm_up(example_batch(recipe), objective)
    startup.lap("warm-up")
    lower_is_better = objective.metric == "loss"
    events = stage.directory / JOURNAL_FILE
    checkpoints = Checkpoints(
        store,
        engine,
        log,
        recipe.checkpoint,
        saved=start if resumed else None,
        steps_per_epoch=feed.steps_per_epoch,
        best=world.on_main(lambda: best_evaluation(journal.read_events(events), objective.metric, lower_is_better)),
        hurry=lambda: stop.number != 0,
        reach_steps=recipe.health.reach_steps,
    )
    stack.callback(checkpoints.close)

    actions = Actions(stage, engine, objective, feed, validation, checkpoints, log, stop, watchdog, last)
    outcome = train(
        start=start,
        last=last,
        engine=engine,
        objective=objective,
        feed=feed,
        learning_rate=partial(
            learning_rate,
            steps_per_epoch=feed.steps_per_epoch,
            epochs=recipe.schedule.epochs,
            warmup_epochs=recipe.schedule.warmup_epochs,
            lr=recipe.learning_rate,
            min_lr=recipe.schedule.min_lr,
        ),
        actions=actions.all(),
        checkpoints=checkpoints,
        rollbacks=Rollbacks(guard, engine, store, checkpoints, log.write),
        log=log,
        stop=stop,
        watchdog=watchdog,
    )
    watchdog.phase("finish", outcome.step)
    if outcome.kind is OutcomeKind.DONE:
        weights = handoff.hand_on(stage, engine, last, classes)
        world.on_main(lambda: records.write_result(stage, weights, objective.metric, log, last, world.size))
    log.write("end", outcome=outcome.kind, reason=outcome.reason, step=outcome.step)
    stage.attempts.record(outcome)
    # Not when stopped: a grace period is short, and the plotting library alone takes a second of it.
    if world.is_main and outcome.kind is OutcomeKind.DONE:
        pictures.draw_curves(stage.directory / JOURNAL_FILE, stage.directory / CURVES_FILE)
        log.write("picture", step=outcome.step, path=CURVES_FILE)
    return outcome


def _load(
    stage: Stage,
    engine: Engine,
    objective: Objective,
    store: CheckpointStore,
    log: StepLog,
    classes: tuple[str, ...],
    feed: TrainFeed,
    last: int,
) -> tuple[int, bool]:
    """Weights and optimizer from the newest checkpoint, else from the stage before; the number of finished steps, and
    whether they come from a checkpoint."""
    resumed = store.ever_committed()
    received = None if resumed else handoff.receive(stage, engine, objective, classes)
    engine.attach_components(last)
    engine.guard = guard = Guard(stage.recipe.health, engine.world.device)
    engine.components.append(guard)
    if received is not None:
        store.parents = [f"weights of sha256 {received.sha256}"]
        transfer, head = received.transfer, received.head
        mapped = {"head_mapped": len(head.matched), "head_initialised": head.unmatched} if head else {}
        log.write(
            "handoff",
            step=0,
            source=received.source,
            sha256=received.sha256,
            loaded=len(transfer.loaded),
            initialised=transfer.initialised,
            dropped=transfer.dropped,
            **mapped,
        )
    if stage.recipe.sparsity and not resumed:
        log.write("sparsity", step=0, densities=start_sparsity(engine, objective, feed.slots(0)))
    start = store.restore(engine.state(0)) if resumed else 0
    engine.refresh()
    guard.restored()
    return start, resumed


def _watchdog(stage: Stage, world: World, leave: Callable[[Outcome], None]) -> Watchdog:
    def end(sentence: str, step: int) -> None:
        outcome = Outcome(OutcomeKind.BAD_NODE, sentence, step)
        print(sentence, file=sys.stderr)
        with suppress(Exception):  # whatever the stage's disk says, the process must end
            stage.attempts.record(outcome)
            outcome = stage.attempts.last_outcome() or outcome
        leave(outcome)

    directory = stage.directory / HEALTH_FOLDER / f"{stage.attempts.own:06d}"
    return Watchdog(directory, world.rank, world.size, stage.recipe.health.stall_seconds, end)


def main() -> None:
    """One rank of a stage, as a process. The sentence of a permanent outcome goes to stderr, on rank 0."""
    die_with_parent(int(os.environ.get(LAUNCHER_PID, 0)))
    try:
        outcome = run_stage(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        outcome = Outcome(OutcomeKind.PERMANENT)
    if outcome.kind in (OutcomeKind.PERMANENT, OutcomeKind.BAD_NODE) and outcome.reason:
        print(outcome.reason, file=sys.stderr)
    leave(outcome)


if __name__ == "__main__":
    main()
