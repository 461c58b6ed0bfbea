"""Run or resume one stage, given nothing but its directory: `python -m pipeline.run DIRECTORY`, one process a rank."""

import importlib.metadata
import math
import os
import platform
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline import handoff
from pipeline.checkpoint.store import CheckpointStore
from pipeline.data.beton import Beton
from pipeline.data.checks import open_data
from pipeline.data.feed import Batch, EvaluationFeed, TrainFeed
from pipeline.engines import Engine, World, create_engine
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.health.processes import die_with_parent
from pipeline.health.signals import AgreedStop, StopRequest
from pipeline.objectives import Objective, create_objective
from pipeline.optim.schedule import learning_rate
from pipeline.randomness import text_key
from pipeline.recipe import StageRecipe
from pipeline.stage import Outcome, OutcomeKind, Stage
from pipeline.tracking import journal, pictures
from pipeline.tracking.forwarder import start_forwarder
from pipeline.trainer import Action, Checkpoints, StepLog, train

EXIT_CODES = {OutcomeKind.DONE: 0, OutcomeKind.SAVED: 75, OutcomeKind.BAD_NODE: 76, OutcomeKind.PERMANENT: 1}


def run_stage(directory: Path) -> Outcome:
    """Run the stage to its end, or until a signal asks for a stop. One call per rank (see `World.join`).

    Returns once the outcome is in the stage directory. User errors become a permanent outcome; any other exception is
    noted as one and raised.
    """
    request = StopRequest().install()
    try:
        stage = Stage(directory)
    except UserError as error:
        return Outcome(OutcomeKind.PERMANENT, str(error))
    if done := stage.done():
        return Outcome(OutcomeKind.DONE, step=done.step)
    try:
        with ExitStack() as stack:
            outcome = _run(stage, request, stack)
    except UserError as error:
        outcome = _failure(error)
    except BaseException as error:
        stage.record(_failure(error))
        raise
    stage.record(outcome)
    return outcome


def _failure(error: BaseException) -> Outcome:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Outcome(OutcomeKind.PERMANENT, reason)


def _run(stage: Stage, request: StopRequest, stack: ExitStack) -> Outcome:
    recipe = stage.recipe
    world = World.join(recipe.engine.device, recipe.engine.threads)
    stack.callback(world.leave)
    recipe.check_world_size(world.size)
    stage.attempt = world.on_main(lambda: stage.take(world.size))
    stop = AgreedStop(request, world.agree)
    data = open_data(recipe)
    world.on_main(lambda: stage.pin_data({name: beton.sha256 for name, beton in data.items()}))
    log_file = _open_journal(stage, world, stop, stack)
    log = StepLog(log_file, world.sum, recipe.tracking.log_every_steps, recipe.batch.global_batch)

    seed = text_key(recipe.seed, recipe.name)
    objective = create_objective(recipe, seed)
    engine = create_engine(objective.build_model(), recipe, world)
    feed = _train_feed(recipe, data["train"], seed, world)
    stack.callback(feed.close)
    validation = _evaluation_feed(recipe, data["validation"], world)
    store = CheckpointStore(
        stage.directory / "checkpoints",
        attempt=stage.attempt,
        group=world.group,
        still_current=stage.still_current,
        facts={"recipe": recipe.fingerprint(), "data": data["train"].sha256, "engine": recipe.engine.kind},
        on_event=lambda message: log.write("event", level="warning", message=message),
    )
    start = _load(stage, engine, objective, store, log)
    last = math.ceil(recipe.schedule.epochs * feed.steps_per_epoch)
    log.write(
        "attempt",
        step=start,
        total_steps=last,
        world_size=world.size,
        global_batch=recipe.batch.global_batch,
        objective=recipe.objective.kind,
        device=str(world.device),
        versions=_versions(),
    )
    engine.warm_up(_example_batch(recipe), objective)
    checkpoints = Checkpoints(store, engine, log, saved=start or None, keep_last=recipe.checkpoint.keep_last)

    def run_evaluation(step: int) -> None:
        look = partial(_picture, stage, objective, log, step)
        metrics = evaluate(engine, objective, validation, stop, look)
        if metrics is not None:
            log.write("evaluate", step=step, metrics=metrics)

    every_steps = max(round(recipe.evaluation.every_epochs * feed.steps_per_epoch), 1)
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
        actions=[
            Action(
                due=lambda step: step == last or (step > 0 and step % recipe.checkpoint.every_steps == 0),
                run=lambda step: checkpoints.save(step, why="end" if step == last else "due"),
            ),
            Action(
                due=lambda step: (
                    (step == last or (step > 0 and step % every_steps == 0))
                    and not world.on_main(lambda: log.has("evaluate", step))
                ),
                run=run_evaluation,
            ),
        ],
        checkpoints=checkpoints,
        log=log,
        stop=stop,
    )
    if outcome.kind is OutcomeKind.DONE:
        world.on_main(lambda: _finish(stage, engine, objective, last, world.size))
    log.write("end", outcome=outcome.kind, reason=outcome.reason, step=outcome.step)
    stage.record(outcome)
    if world.is_main:
        pictures.curves(stage.directory / "journal.jsonl", stage.directory / "curves.png")
        log.write("picture", step=outcome.step, path="curves.png")
    return outcome


def _load(stage: Stage, engine: Engine, objective: Objective, store: CheckpointStore, log: StepLog) -> int:
    """Weights and optimizer from the newest checkpoint, else from the stage before; the number of finished steps."""
    resumed = store.ever_committed()
    transfer = None if resumed else handoff.receive(stage, engine, objective)
    engine.attach_components()
    if transfer is not None:
        log.write(
            "handoff", step=0, loaded=len(transfer.loaded), initialised=transfer.initialised, dropped=transfer.dropped
        )
    return store.restore(engine.state(0)) if resumed else 0


def _train_feed(recipe: StageRecipe, beton: Beton, seed: int, world: World) -> TrainFeed:
    return TrainFeed(
        beton,
        image_size=recipe.data.image_size,
        seed=seed,
        slots=recipe.batch.slots,
        slot_size=recipe.batch.slot,
        rank=world.rank,
        world_size=world.size,
        slots_per_micro_batch=recipe.batch.micro_slots,
        workers=recipe.data.workers,
        timeout_seconds=recipe.data.timeout_seconds,
        crop_scale=recipe.data.crop_scale,
        crop_ratio=recipe.data.crop_ratio,
        flip_probability=recipe.data.flip,
    )


def _evaluation_feed(recipe: StageRecipe, beton: Beton, world: World) -> EvaluationFeed:
    return EvaluationFeed(
        beton,
        image_size=recipe.data.image_size,
        crop_pct=recipe.data.crop_pct,
        batch_size=recipe.evaluation.batch,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.data.workers,
        timeout_seconds=recipe.data.timeout_seconds,
    )


def _example_batch(recipe: StageRecipe) -> Batch:
    n, size = recipe.batch.slot * recipe.batch.micro_slots, recipe.data.image_size
    return Batch(
        images=torch.zeros(n, 3, size, size, dtype=torch.uint8),
        labels=torch.zeros(n, dtype=torch.int64),
        ids=torch.arange(n),
        epoch=0,
        slots=tuple(range(recipe.batch.micro_slots)),
        valid=torch.ones(n, dtype=torch.bool),
    )


def _open_journal(stage: Stage, world: World, stop: AgreedStop, stack: ExitStack) -> journal.Journal | None:
    """Rank 0's journal, followed by MLflow's forwarder. The stack ends both, with the reason of a failure in them."""
    if not world.is_main:
        return None
    log_file = stack.enter_context(journal.Journal(stage.directory / "journal.jsonl", stage.attempt))
    for change in journal.changed_versions(log_file.path, _versions()):
        log_file.write("event", level="warning", message=change)
    tracking = stage.recipe.tracking
    if tracking.mlflow:
        forwarder = start_forwarder(stage.directory, tracking.mlflow_uri, tracking.experiment)
        # A grace period is for the checkpoint; what MLflow has not got by then, the next attempt sends.
        stack.callback(lambda: forwarder.finish(10 if stop.number else 60))

    def end_in_failure(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            failure = _failure(error)
            stage.record(failure)
            log_file.write("end", outcome=failure.kind, reason=failure.reason, step=None)

    stack.push(end_in_failure)
    return log_file


def _picture(stage: Stage, objective: Objective, log: StepLog, step: int, model: nn.Module, batch: Batch) -> None:
    count = stage.recipe.tracking.pictures
    batch = replace(
        batch,
        images=batch.images[:count],
        labels=batch.labels[:count],
        ids=batch.ids[:count],
        valid=batch.valid[:count],
    )
    painted = objective.paint(model, batch) if count else None
    if painted is not None and log.is_main:
        path = stage.directory / "pictures" / f"step-{step:09d}.png"
        path.parent.mkdir(exist_ok=True)
        pictures.reconstruction(
            batch.images[:count].cpu().numpy(), painted[0].cpu().numpy(), painted[1].cpu().numpy(), path
        )
        log.write("picture", step=step, path=str(path.relative_to(stage.directory)))


def _finish(stage: Stage, engine: Engine, objective: Objective, step: int, world_size: int) -> None:
    events = journal.read(stage.directory / "journal.jsonl")
    recipe = stage.recipe
    metrics = [e["metrics"] for e in events if e["kind"] == "evaluate" and e["step"] == step][-1]
    spans: dict[int, list[float]] = {}
    for event in events:
        spans.setdefault(event["attempt"], []).append(event["time"])
    result = {
        "stage": recipe.name,
        "objective": recipe.objective.kind,
        "steps": step,
        "images_seen": step * recipe.batch.global_batch,
        "world_size": world_size,
        "seconds": round(sum(times[-1] - times[0] for times in spans.values()), 1),
        "metrics": {objective.metric: metrics[objective.metric], **metrics},
        **handoff.hand_on(stage, engine, step),
    }
    stage.finish(result, step)


def _versions() -> dict[str, str]:
    names = ("fcmae", "torch", "numpy", "numba", "ffcv")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def main() -> None:
    """One rank of a stage, as a process. The sentence of a permanent outcome goes to stderr, on rank 0."""
    die_with_parent()
    try:
        outcome = run_stage(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        outcome = Outcome(OutcomeKind.PERMANENT)
    if outcome.kind is OutcomeKind.PERMANENT and outcome.reason:
        print(outcome.reason, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the loader and of gloo outlive their owners now and then and abort an orderly exit.
    os._exit(EXIT_CODES[outcome.kind])


if __name__ == "__main__":
    main()
