"""Journal the loss, learning rate, gradient norm and throughput of every step."""

import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.engines import StepReport
from pipeline.tracking.journal import Journal
from pipeline.tracking.rank_times import RankTimes
from pipeline.tracking.utilisation import Utilisation


class StepLog:
    """Keeps step reports on the device and reads several together, so that no step waits for the device.

    Args:
        journal: the journal on rank 0, None on other ranks.
        world_sum: sums a CPU tensor over all ranks.
        every_steps: number of steps whose reports are read together.
        global_batch: images per step.
        ranks: this rank's time among those of all ranks, which travel with the losses.
        utilisation: what a throughput means for the GPUs; None where that is not known, as on CPUs.
    """

    def __init__(
        self,
        journal: Journal | None,
        world_sum: Callable[[torch.Tensor], torch.Tensor],
        every_steps: int,
        global_batch: int,
        ranks: RankTimes | None = None,
        utilisation: Utilisation | None = None,
    ):
        self._journal, self._world_sum, self._ranks = journal, world_sum, ranks
        self._utilisation = utilisation
        self._every, self._global_batch = every_steps, global_batch
        self._pending: list[tuple[int, StepReport, float, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time until now, of an evaluation or a save, from the throughput."""
        self._since = time.perf_counter()

    def add(self, step: int, report: StepReport, lr: float, wait_seconds: float = 0.0) -> None:
        """Keep a step's report. `wait_seconds` for data is divided by the number of ranks already."""
        self._pending.append((step, report, lr, wait_seconds))

    @property
    def is_full(self) -> bool:
        """Whether `every_steps` reports are kept."""
        return len(self._pending) >= self._every

    def flush(self) -> None:
        """Journal the kept steps, with a warning for each that was skipped. Collective."""
        if not self._pending:
            return
        reports = [report for _, report, _, _ in self._pending]
        losses = torch.stack([report.loss for report in reports]).cpu()
        waits = torch.tensor([wait for *_, wait in self._pending], dtype=losses.dtype)
        times = self._ranks.own(sum(wait for *_, wait in self._pending) / len(waits)) if self._ranks else waits[:0]
        summed = self._world_sum(torch.cat([losses, waits, times.to(losses)]))
        losses, waits, times = summed.split([len(losses), len(waits), len(times)])
        norms = torch.stack([report.gradient_norm for report in reports]).cpu()
        accepted = torch.stack([report.accepted for report in reports]).cpu()
        seconds = time.perf_counter() - self._since
        speed = len(self._pending) * self._global_batch / seconds
        used = self._utilisation.of(speed) if self._utilisation else None
        figures = zip(self._pending, losses.tolist(), norms.tolist(), waits.tolist(), accepted.tolist(), strict=True)
        for (step, _, lr, _), loss, norm, wait, updated in figures:
            self.write(
                "step",
                step=step,
                loss=loss,
                lr=lr,
                gradient_norm=norm,
                images_per_second=round(speed, 1),
                data_wait_seconds=round(wait, 4),
                **({} if used is None else {"utilisation": round(used, 4)}),
                **({} if updated else {"refused": True}),
            )
            if not updated:
                message = f"step {step} was skipped: its loss is {loss:.4g}, its gradient norm {norm:.4g}"
                self.write("event", level="warning", message=message)
        if self._journal and self._ranks and (answer := self._ranks.judge(times, seconds / len(waits))):
            fields, message = answer
            self.write("ranks", step=self._pending[-1][0], **fields)
            if message:
                self.write("event", level="warning", message=message, step=self._pending[-1][0])
        self._pending.clear()
        self.restart_clock()

    def write(self, kind: str, **fields: Any) -> None:
        """Write a line to the journal on rank 0; do nothing on other ranks."""
        if self._journal:
            self._journal.write(kind, **fields)

    @property
    def is_main(self) -> bool:
        return self._journal is not None

    def has(self, kind: str, step: int) -> bool:
        """Whether the journal has a line of this kind and step that is not withdrawn. False on other ranks."""
        return self._journal is not None and self._journal.has(kind, step)
