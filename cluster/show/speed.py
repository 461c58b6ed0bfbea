"""How fast a stage trains, from the last step lines of its journal."""

from collections import deque
from itertools import pairwise
from typing import Any, NamedTuple

from pipeline.tracking.journal import Event, is_number

STEP_LINES = 20  # of the running attempt, which speed and ETA are taken from


class Step(NamedTuple):
    """A step line of the journal."""

    time: float  # epoch seconds
    number: int
    images_per_second: float
    data_wait_seconds: float | None
    utilisation: float | None = None


class Speed:
    """Throughput, data wait and ETA of the running attempt.

    Attributes:
        steps: the last steps of the attempt.
        global_batch: of the attempt; None if unknown.
        first: number of the attempt's first step, whose time does not count: it also compiles and allocates.
    """

    def __init__(self) -> None:
        self.steps: deque[Step] = deque(maxlen=STEP_LINES)
        self.global_batch: float | None = None
        self.first = 1

    def add(self, step: int, event: Event) -> None:
        """Add a step line. Odd values count as absent."""
        time, rate = number(event.get("time")) or 0.0, number(event.get("images_per_second")) or 0.0
        wait, used = number(event.get("data_wait_seconds")), number(event.get("utilisation"))
        self.steps.append(Step(time, step, rate, wait, used))

    def _timed(self) -> list[Step]:
        return [step for step in self.steps if step.images_per_second and step.number != self.first]

    def images_per_second(self) -> float | None:
        """Mean over time, not over steps: a slow step weighs as much as it lasts."""
        seconds_per_image = [1 / step.images_per_second for step in self._timed()]
        spent = sum(seconds_per_image)
        return len(seconds_per_image) / spent if spent else None

    def utilisation(self) -> float | None:
        """The part of the GPUs' peak, as a mean over time."""
        steps = [s for s in self._timed() if s.utilisation is not None]
        spent = sum(1 / s.images_per_second for s in steps)
        return sum(s.utilisation / s.images_per_second for s in steps) / spent if spent else None

    def data_wait_fraction(self) -> float | None:
        """The part of the time of the steps that they waited for data."""
        steps = [s for s in self._timed() if s.data_wait_seconds is not None]
        spent = (self.global_batch or 0) * sum(1 / step.images_per_second for step in steps)
        return min(1.0, sum(step.data_wait_seconds for step in steps) / spent) if spent else None

    def eta_seconds(self, total_steps: int | None) -> float | None:
        """Until the last step, by the time between the lines, evaluations included; without it by the steps' rate.

        Lines that are written together have one rate and one time, that of their last step's end.
        """
        if not self.steps or not total_steps:
            return None
        last, rate = self.steps[-1], self.images_per_second()
        ends = (one for one, after in pairwise(self.steps) if one.images_per_second != after.images_per_second)
        first = next(ends, last)
        if last.number > first.number and last.time > first.time:
            seconds_per_step = (last.time - first.time) / (last.number - first.number)
        elif rate and self.global_batch:
            seconds_per_step = self.global_batch / rate
        else:
            return None
        return max(0.0, (total_steps - last.number) * seconds_per_step)


def number(value: Any) -> float | None:
    """`value` if it is a number, else None."""
    return value if is_number(value) else None
