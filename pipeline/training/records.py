"""Write the records of a stage: the journal's lines about an attempt, its environment and data, and the result."""

import importlib.metadata
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch

from pipeline.data.subset import Subset
from pipeline.distributed.agreement import AgreedStop
from pipeline.distributed.world import World
from pipeline.engines.plain_comparison import CodeCheck
from pipeline.health.verdict import judge_journal
from pipeline.recipe import StageRecipe
from pipeline.stage.directory import Stage
from pipeline.stage.environment import describe_commit, describe_machine, describe_software
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking import journal
from pipeline.tracking.forwarder_process import start_forwarder
from pipeline.tracking.step_log import StepLog
from pipeline.training.failures import classify_error


@contextmanager
def open_journal(stage: Stage, world: World, stop: AgreedStop) -> Iterator[journal.Journal | None]:
    """Open the journal and start its forwarder to MLflow, on rank 0; yields None on the others.

    An error that leaves the block is recorded as the outcome of the attempt, also in the journal.
    """
    if not world.is_main:
        yield None
        return
    with ExitStack() as stack:
        log_file = stack.enter_context(journal.Journal(stage.directory / JOURNAL_FILE, stage.attempts.own))
        for change in journal.changed_versions(log_file.path, versions()):
            log_file.write("event", level="warning", message=change)
        tracking = stage.recipe.tracking
        if tracking.mlflow:
            forwarder = start_forwarder(stage.directory, tracking.mlflow_uri, tracking.experiment)
            # Short at a stop, because the grace period is for the checkpoint and the next attempt sends the rest.
            stack.callback(lambda: forwarder.finish(10 if stop.number else 60, partial(_say, log_file)))
        try:
            yield log_file
        except BaseException as error:
            outcome = classify_error(error)
            stage.attempts.record(outcome)
            log_file.write("end", outcome=outcome.kind, reason=outcome.reason, step=outcome.step)
            raise


def _say(log: journal.Journal, sentence: str) -> None:
    with suppress(OSError):  # a full disk must not turn a finished stage into a failed one
        log.write("event", level="info", message=sentence)


def write_attempt(
    log: journal.Journal | None,
    recipe: StageRecipe,
    data: Mapping[str, Subset],
    world: World,
    *,
    step: int,
    total_steps: int,
) -> None:
    """Journal that an attempt starts, and the environment and the data if they differ from the last attempt's."""
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
    log.write_changed("environment", commit=describe_commit(), **describe_software(), **describe_machine())
    log.write_changed("data", **{name: _data_facts(recipe, name, part) for name, part in data.items()})


def write_code_check(log: journal.Journal | None, check: CodeCheck) -> None:
    """Journal how the code of this attempt compares with plain torch, and why another is used than the recipe's."""
    if log and check.event:
        log.write("code_check", **check.event)
    if log and check.warning:
        log.write("event", level="warning", message=check.warning)


def write_result(
    stage: Stage, weights: Mapping[str, Any], metric: str, log: StepLog, step: int, world_size: int
) -> None:
    """Judge the finished stage, write its result and mark it done. On rank 0.

    Args:
        weights: the result's entries about the weights.
        metric: the objective's, listed first.
    """
    events = journal.read_events(stage.directory / JOURNAL_FILE)
    recipe, verdict = stage.recipe, judge_journal(stage.recipe, events).entry()
    log.write("verdict", step=step, **verdict)
    metrics = next(
        (e.get("metrics") or {} for e in reversed(events) if e.get("kind") == "evaluate" and e.get("step") == step), {}
    )
    spans: dict[int, list[float]] = {}
    for event in events:
        if {"attempt", "time"} <= event.keys():
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


def checkpoint_facts(recipe: StageRecipe, data_hashes: Mapping[str, str]) -> dict[str, Any]:
    """What every checkpoint's manifest tells about its origin."""
    return {
        "recipe": recipe.fingerprint(),
        "data": dict(data_hashes),
        "engine": recipe.engine.kind,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the software that decides about the bits of training."""
    names = ("fcmae", "torch", "numpy", "numba", "ffcv")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _data_facts(recipe: StageRecipe, name: str, part: Subset) -> dict[str, Any]:
    beton = part.beton
    return {
        "path": getattr(recipe.data, name),
        "sha256": beton.identity,
        "samples": beton.samples,
        "images": part.samples,
        "classes": len(part.classes),
        "classes_with_images": part.classes_with_images,
        "bytes": beton.total_bytes,
        "settings": beton.settings,
    }
