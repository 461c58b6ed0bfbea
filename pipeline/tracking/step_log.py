"""Journal the loss, learning rate, gradient norm and throughput of every step."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pipeline.engines import StepReport
from pipeline.tracking.journal import Journal
from pipeline.tracking.rank_times import RankTimes
from pipeline.tracking.utilisation import Utilisation

FIRST_STEPS = 3  # of an attempt, journalled one by one: the first takes longer, and each may take minutes


class _Values:
    """Loss, gradient norm and fate of a step, and the parts of its loss.

    On a GPU they are copied to pinned memory, and nobody waits.
    """

    def __init__(self, report: StepReport):
        values = (report.loss, report.gradient_norm, report.accepted, *report.parts.values())
        self._values = torch.stack([each.double() for each in values])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            device, pinned = self._values, torch.empty(len(values), dtype=torch.float64, pin_memory=True)
            self._values, self._arrived = pinned.copy_(device, non_blocking=True), torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device.device))

    def read(self) -> list[float]:
        """Wait for the step, not for later ones, and return its values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class _Kept(NamedTuple):
    """A step that is not journalled yet."""

    step: int
    values: _Values
    lr: float
    wait_seconds: float
    parts: tuple[str, ...]
    """Names of the last values."""


class StepLog:
    """Keeps step reports and reads several together, so that no step waits for the device.

    Args:
        journal: the journal on rank 0, None on other ranks.
        world_sum: sums a CPU tensor over all ranks.
        every_steps: number of steps whose reports are read together.
        global_batch: images per step.
        ranks: this rank's time among those of all ranks, which travel with the losses.
        utilisation: what a throughput means for the GPUs; None where that is not known, as on CPUs.
        late: a flush may leave the newest step to the next one, as on a GPU, which is busy with it.
    """

    def __init__(
        self,
        journal: Journal | None,
        world_sum: Callable[[torch.Tensor], torch.Tensor],
        every_steps: int,
        global_batch: int,
        ranks: RankTimes | None = None,
        utilisation: Utilisation | None = None,
        late: bool = False,
    ):
        self._journal, self._world_sum, self._ranks = journal, world_sum, ranks
        self._utilisation = utilisation
        self._every, self._global_batch = every_steps, global_batch
        self._late = late
        self._pending: list[_Kept] = []
        self._first_steps = FIRST_STEPS
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time until now, of an evaluation or a save, from the throughput."""
        self._since = time.perf_counter()

    def add(self, step: int, report: StepReport, lr: float, wait_seconds: float = 0.0) -> None:
        """Keep a step's report. `wait_seconds` for data is divided by the number of ranks already."""
        self._pending.append(_Kept(step, _Values(report), lr, wait_seconds, tuple(report.parts)))

    @property
    def is_full(self) -> bool:
        """Whether a flush is due: `every_steps` reports are kept, and on a GPU the one of the step that it computes.

        All ranks must answer alike, so it depends on the number of steps alone, not on their time.
        """
        return len(self._pending) >= (1 if self._first_steps > 0 else self._every) + self._late

    def flush(self, *, keep_newest: bool = False) -> bool:
        """Journal the kept steps, with a warning for each that was skipped. Collective.

        keep_newest: on a GPU, leave the newest step for the next flush, so that the GPU computes it meanwhile.

        Returns:
            Whether a step was skipped.
        """
        count = len(self._pending) - (self._late and keep_newest)
        if count <= 0:
            return False
        flushed, self._pending = self._pending[:count], self._pending[count:]
        self._first_steps -= count
        read = torch.tensor([kept.values.read() for kept in flushed], dtype=torch.float64)
        (losses, norms, accepted), parts = read[:, :3].unbind(1), read[:, 3:]
        now = time.perf_counter()  # the device has just computed the last flushed step, and the next stretch begins
        seconds, self._since = max(now - self._since, 1e-9), now
        waits = torch.tensor([kept.wait_seconds for kept in flushed], dtype=torch.float64)
        times = self._ranks.own(sum(waits.tolist()) / count) if self._ranks else waits[:0]
        summed = self._world_sum(torch.cat([losses, waits, times, parts.flatten()]))
        losses, waits, times, parts = summed.split([count, count, len(times), parts.numel()])
        speed = count * self._global_batch / seconds
        used = self._utilisation.of(speed) if self._utilisation else None
        columns = (losses, norms, waits, accepted, parts.view(count, read.shape[1] - 3))
        for kept, loss, norm, wait, updated, own in zip(flushed, *(each.tolist() for each in columns), strict=True):
            self.write(
                "step",
                step=kept.step,
                loss=loss,
                **{f"loss_{name}": part for name, part in zip(kept.parts, own, strict=True)},
                lr=kept.lr,
                gradient_norm=norm,
                images_per_second=float(f"{speed:.6g}"),
                data_wait_seconds=round(wait, 4),
                **({} if used is None else {"utilisation": round(used, 4)}),
                **({} if updated else {"refused": True}),
            )
            if not updated:
                message = f"step {kept.step} was skipped: its loss is {loss:.4g}, its gradient norm {norm:.4g}"
                self.write("event", level="warning", message=message)
        if self._journal and self._ranks and (answer := self._ranks.judge(times, seconds / count)):
            fields, message = answer
            self.write("ranks", step=flushed[-1].step, **fields)
            if message:
                self.write("event", level="warning", message=message, step=flushed[-1].step)
        return not bool(accepted.all())

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
