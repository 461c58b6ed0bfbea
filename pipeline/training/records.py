"""What a stage writes down about itself: its journal, what it is made of and runs on, and its result."""

import importlib.metadata
import os
import platform
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from pipeline.data.subset import Subset
from pipeline.distributed.stop import AgreedStop
from pipeline.distributed.world import World
from pipeline.health.verdict import judge_journal
from pipeline.recipe import StageRecipe
from pipeline.stage.directory import Stage
from pipeline.stage.environment import commit, machine, software
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking import journal
from pipeline.tracking.forwarder import start_forwarder
from pipeline.tracking.step_log import StepLog
from pipeline.training.failures import failure


def open_journal(stage: Stage, world: World, stop: AgreedStop, stack: ExitStack) -> journal.Journal | None:
    """Rank 0's journal, followed by MLflow's forwarder. The stack ends both, with the reason of a failure in them."""
    if not world.is_main:
        return None
    log_file = stack.enter_context(journal.Journal(stage.directory / JOURNAL_FILE, stage.attempts.own))
    for change in journal.changed_versions(log_file.path, versions()):
        log_file.write("event", level="warning", message=change)
    tracking = stage.recipe.tracking
    if tracking.mlflow:
        forwarder = start_forwarder(stage.directory, tracking.mlflow_uri, tracking.experiment)
        # A grace period is for the checkpoint; what MLflow has not got by then, the next attempt sends.
        stack.callback(lambda: forwarder.finish(10 if stop.number else 60))

    def end_in_failure(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            outcome = failure(error)
            stage.attempts.record(outcome)
            log_file.write("end", outcome=outcome.kind, reason=outcome.reason, step=outcome.step)

    stack.push(end_in_failure)
    return log_file


def write_attempt(
    log: journal.Journal | None,
    recipe: StageRecipe,
    data: Mapping[str, Subset],
    world: World,
    *,
    step: int,
    total_steps: int,
) -> None:
    """The attempt's line, and the environment's and the data's where they are not those of the attempt before."""
    if log is None:
        return
    log.write(
        "attempt",
        step=step,
        total_steps=total_steps,
        world_size=world.size,
        global_batch=recipe.batch.global_batch,
        objective=recipe.objective.kind,
        device=str(world.device),
        threads=torch.get_num_threads(),
        host=os.environ.get("SLURM_JOB_NODELIST") or socket.gethostname(),
        job=os.environ.get("SLURM_JOB_ID"),
        versions=versions(),
    )
    log.write_changed("environment", commit=commit(), **software(), **machine())
    log.write_changed("data", **{name: _data_facts(recipe, name, part) for name, part in data.items()})


def write_result(
    stage: Stage, weights: Mapping[str, Any], metric: str, log: StepLog, step: int, world_size: int
) -> None:
    """Judge the finished stage and mark it done; `metric` comes first among those of its last evaluation. On rank 0."""
    events = journal.read_events(stage.directory / JOURNAL_FILE)
    recipe, verdict = stage.recipe, judge_journal(stage.recipe, events).entry()
    log.write("verdict", step=step, **verdict)
    evaluations = [e["metrics"] for e in events if e["kind"] == "evaluate" and e["step"] == step]
    metrics = evaluations[-1] if evaluations else {}
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
        "metrics": {name: metrics[name] for name in sorted(metrics, key=lambda name: name != metric)},
        **weights,
        "verdict": verdict,
    }
    stage.finish(result, step)


def versions() -> dict[str, str]:
    """Of what decides the bits: another version may give other ones."""
    names = ("fcmae", "torch", "numpy", "numba", "ffcv")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _data_facts(recipe: StageRecipe, name: str, part: Subset) -> dict[str, Any]:
    beton = part.beton
    return {
        "path": getattr(recipe.data, name),
        "sha256": beton.sha256,
        "samples": beton.samples,
        "images": part.samples,
        "classes": len(part.classes),
        "bytes": beton.size_bytes,
        "settings": beton.settings,
    }
