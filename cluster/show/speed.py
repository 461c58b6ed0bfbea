"""How fast a stage trains, from the last step lines of its journal."""

from collections import deque
from typing import Any, NamedTuple

from pipeline.tracking.journal import Event, is_number

STEP_LINES = 20  # of the running attempt, which speed and ETA are taken from


class _Step(NamedTuple):
    time: float  # epoch seconds
    number: int
    images_per_second: float
    data_wait_seconds: float | None


class Speed:
    """Throughput, data wait and ETA of the running attempt. Odd values in the journal count as absent."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=STEP_LINES)
        self._global_batch: float | None = None

    def restart(self, attempt: Event) -> None:
        """Forget the steps of the attempt before; take the global batch of the new one."""
        self._steps.clear()
        self._global_batch = number(attempt.get("global_batch"))

    def forget(self) -> None:
        self._steps.clear()

    def add(self, step: int, event: Event) -> None:
        """Add a step line."""
        time, rate = number(event.get("time")) or 0.0, number(event.get("images_per_second")) or 0.0
        self._steps.append(_Step(time, step, rate, number(event.get("data_wait_seconds"))))

    def images_per_second(self) -> float | None:
        """Mean over time, not over steps: a slow step weighs as much as it lasts."""
        seconds_per_image = [1 / step.images_per_second for step in self._steps if step.images_per_second]
        spent = sum(seconds_per_image)
        return len(seconds_per_image) / spent if spent else None

    def data_wait_fraction(self) -> float | None:
        """The part of the time of the steps that they waited for data."""
        steps = [s for s in self._steps if s.images_per_second and s.data_wait_seconds is not None]
        spent = (self._global_batch or 0) * sum(1 / step.images_per_second for step in steps)
        return min(1.0, sum(step.data_wait_seconds for step in steps) / spent) if spent else None

    def eta_seconds(self, total_steps: int | None) -> float | None:
        """Until the last step, by the time between the lines; with a single line by its own rate."""
        if not self._steps or not total_steps:
            return None
        first, last = self._steps[0], self._steps[-1]
        if last.number > first.number and last.time > first.time:
            seconds_per_step = (last.time - first.time) / (last.number - first.number)
        elif last.images_per_second and self._global_batch:
            seconds_per_step = self._global_batch / last.images_per_second
        else:
            return None
        return max(0.0, (total_steps - last.number) * seconds_per_step)


def number(value: Any) -> float | None:
    """`value` if it is a number, else None."""
    return value if is_number(value) else None
