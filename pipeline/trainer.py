"""The loop. It knows no engine, no scheduler and no file format."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint.retention import prune
from pipeline.checkpoint.store import CheckpointStore
from pipeline.data.feed import TrainFeed
from pipeline.engines import Engine, Report
from pipeline.errors import StageError
from pipeline.health.signals import AgreedStop
from pipeline.objectives import Objective
from pipeline.stage import Outcome, OutcomeKind
from pipeline.tracking.journal import Journal


@dataclass(frozen=True)
class Action:
    """Something to do between steps, when due and not done before. A stop may keep it from finishing."""

    due: Callable[[int], bool]
    run: Callable[[int], None]


def train(
    *,
    start: int,
    last: int,
    engine: Engine,
    objective: Objective,
    feed: TrainFeed,
    learning_rate: Callable[[int], float],
    actions: list[Action],
    checkpoints: "Checkpoints",
    log: "StepLog",
    stop: AgreedStop,
) -> Outcome:
    """Train from `start` finished steps to `last`, or until the ranks agree to stop: then the state is saved.

    A step that a stop interrupts is thrown away whole, so a resumed run repeats it from its first slot.
    """
    step = start
    while True:
        for action in actions:
            if action.due(step) and not stop.number:
                log.flush()
                action.run(step)
                log.restart_clock()
        if step == last and not stop.number:
            checkpoints.save(step, why="end")
            return Outcome(OutcomeKind.DONE, step=step)
        lr = learning_rate(step)
        report = None if stop.number else engine.step(feed.slots(step), objective, step=step, lr=lr, should_stop=stop)
        if report is None:
            log.flush()
            checkpoints.save(step, why=stop.reason)
            return Outcome(OutcomeKind.SAVED, f"stopped by {stop.reason}", step)
        step += 1
        log.add(step, report, lr, feed.take_wait())


class Checkpoints:
    """Saves the engine's state once per step, however many reasons there are."""

    def __init__(self, store: CheckpointStore, engine: Engine, log: "StepLog", saved: int | None, keep_last: int):
        self._store, self._engine, self._log = store, engine, log
        self._saved, self._keep_last = saved, keep_last

    def save(self, step: int, why: str) -> None:
        if step == self._saved:
            return
        self._log.flush()
        began = time.perf_counter()
        path = self._store.save(self._engine.state(step), step=step, why=why)
        self._saved = step
        self._log.write("save", step=step, why=why, path=path, seconds=round(time.perf_counter() - began, 3))
        prune(self._store, keep_last=self._keep_last)


class StepLog:
    """Step reports stay on the device and are read together every few steps, so that no step waits for the host.

    Args:
        journal: rank 0's; None on the others, which only take part in the sums.
        world_sum: adds a CPU tensor over the ranks.
        every_steps: how often the reports are read.
        global_batch: images per step.
    """

    def __init__(
        self,
        journal: Journal | None,
        world_sum: Callable[[torch.Tensor], torch.Tensor],
        every_steps: int,
        global_batch: int,
    ):
        self._journal, self._world_sum = journal, world_sum
        self._every, self._global_batch = every_steps, global_batch
        self._pending: list[tuple[int, Report, float, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time of an evaluation or a save out of the throughput."""
        self._since = time.perf_counter()

    def add(self, step: int, report: Report, lr: float, wait_seconds: float = 0.0) -> None:
        """`wait_seconds` for data is this rank's share: the sum over ranks is their mean."""
        self._pending.append((step, report, lr, wait_seconds))
        if len(self._pending) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Journal the pending steps.

        Raises:
            StageError: if a loss is not finite.
        """
        if not self._pending:
            return
        reports = [report for _, report, _, _ in self._pending]
        losses = torch.stack([report.loss for report in reports]).cpu()
        waits = torch.tensor([wait for *_, wait in self._pending], dtype=losses.dtype)
        losses, waits = self._world_sum(torch.stack([losses, waits]))
        norms = torch.stack([report.gradient_norm for report in reports]).cpu()
        speed = len(self._pending) * self._global_batch / (time.perf_counter() - self._since)
        figures = zip(self._pending, losses.tolist(), norms.tolist(), waits.tolist(), strict=True)
        for (step, _, lr, _), loss, norm, wait in figures:
            self.write(
                "step",
                step=step,
                loss=loss,
                lr=lr,
                gradient_norm=norm,
                images_per_second=round(speed, 1),
                data_wait_seconds=round(wait, 4),
            )
            if not math.isfinite(loss):
                raise StageError(
                    f"the loss of step {step} is {loss}; lower optimizer.base_lr, lengthen schedule.warmup_epochs or"
                    " set optimizer.clip_norm, and start another --out"
                )
        self._pending.clear()
        self.restart_clock()

    def write(self, kind: str, **fields: Any) -> None:
        """Journal a line, on rank 0."""
        if self._journal:
            self._journal.write(kind, **fields)

    @property
    def is_main(self) -> bool:
        return self._journal is not None

    def has(self, kind: str, step: int) -> bool:
        """Whether the journal has such a line. On rank 0."""
        return self._journal is not None and self._journal.has(kind, step)
