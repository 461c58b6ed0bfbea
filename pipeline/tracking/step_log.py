"""Reports of steps, kept on the device and read together."""

import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.engines import Report
from pipeline.tracking.journal import Journal


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

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush."""
        return len(self._pending) >= self._every

    def flush(self) -> None:
        """Journal the pending steps, and which of them were refused."""
        if not self._pending:
            return
        reports = [report for _, report, _, _ in self._pending]
        losses = torch.stack([report.loss for report in reports]).cpu()
        waits = torch.tensor([wait for *_, wait in self._pending], dtype=losses.dtype)
        losses, waits = self._world_sum(torch.stack([losses, waits]))
        norms = torch.stack([report.gradient_norm for report in reports]).cpu()
        accepted = torch.stack([report.accepted for report in reports]).cpu()
        speed = len(self._pending) * self._global_batch / (time.perf_counter() - self._since)
        figures = zip(self._pending, losses.tolist(), norms.tolist(), waits.tolist(), accepted.tolist(), strict=True)
        for (step, _, lr, _), loss, norm, wait, made in figures:
            self.write(
                "step",
                step=step,
                loss=loss,
                lr=lr,
                gradient_norm=norm,
                images_per_second=round(speed, 1),
                data_wait_seconds=round(wait, 4),
                **({} if made else {"refused": True}),
            )
            if not made:
                message = f"step {step} was not made: its loss is {loss:.4g}, its gradient norm {norm:.4g}"
                self.write("event", level="warning", message=message)
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
