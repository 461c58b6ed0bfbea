"""How far a stage comes in a given time, and which checkpoints it commits, without a loop over its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SAVES_LISTED = 8  # of one attempt, the newest; older ones are pruned long before


@dataclass(frozen=True)
class StageWork:
    """A stage as the simulation sees it: so many equal steps, and a checkpoint every so many of them."""

    name: str
    steps: int
    step_seconds: float
    """Mean time of a step, with the share of the evaluations that falls to it."""
    save_every_steps: int
    previous: str | None = None
    nodes: int = 1
    evaluation_share: float = 0.0
    """The part of step_seconds that is evaluation."""
    blocked_seconds: float = 0.0
    """How long a save in the background holds up training."""
    save_seconds: float = 0.0
    """From the start of a save until it is committed."""
    limit_seconds: float = math.inf
    """The time limit of one start of the job."""
    stop_before_end_seconds: float = 0.0
    most_without_progress: int = 3
    keep_last: int = 2
    reach_steps: int = 110
    most_fallbacks: int = 3

    @property
    def held_up_seconds(self) -> float:
        """How long each save holds up training: a save waits until the one before it is committed."""
        return max(self.blocked_seconds, self.save_seconds - self.save_every_steps * self.step_seconds)

    def seconds_until(self, start: int, step: int) -> float:
        """From the first step of an attempt that resumes at `start` until `step` is finished."""
        saves = (step - 1) // self.save_every_steps - start // self.save_every_steps if step > start else 0
        return (step - start) * self.step_seconds + (saves + (start == 0)) * self.held_up_seconds

    def progress(self, start: int, seconds: float) -> "AttemptProgress":
        """What an attempt that resumes at `start` has done after so many seconds of training."""
        step = self._last_step_within(start, seconds)
        every, held_up = self.save_every_steps, self.held_up_seconds
        newest = min(step, self.steps - 1) // every * every
        # The last step's own checkpoint is saved by the end of the stage, and a restored one is not saved again.
        first = max(start + (start > 0), newest - SAVES_LISTED * every)
        due = [number for number in range(newest, first - 1, -every)][::-1]
        begun = [(number, self._begins(start, number)) for number in due]
        committed = tuple(number for number, time in begun if time + self.save_seconds <= seconds)
        count = newest // every - start // every + (start == 0) if newest >= start else 0
        spent = max(count - 1, 0) * held_up + (min(held_up, seconds - begun[-1][1]) if begun else 0.0)
        return AttemptProgress(step, committed, spent, max(seconds - (step - start) * self.step_seconds - spent, 0.0))

    def _begins(self, start: int, number: int) -> float:
        """When the save of a step begins."""
        return 0.0 if number == start else self.seconds_until(start, number)

    def _last_step_within(self, start: int, seconds: float) -> int:
        first, held_up, duration = self.save_every_steps, self.held_up_seconds, self.step_seconds
        left = seconds - (held_up if start == 0 else 0.0)
        until_save = first - start % first
        if left <= until_save * duration:
            step = start + math.floor(max(left, 0.0) / duration + 1e-9)
        else:
            left -= until_save * duration
            cycles, left = divmod(left, held_up + first * duration)
            step = start + until_save + int(cycles) * first + math.floor(max(left - held_up, 0.0) / duration + 1e-9)
        return min(step, self.steps)


@dataclass(frozen=True)
class AttemptProgress:
    """The state of an attempt at a moment."""

    step: int
    """Finished steps."""
    committed: Sequence[int]
    """Steps of the newest checkpoints that this attempt committed, in order."""
    blocked_seconds: float
    """How long saves held up training."""
    partial_seconds: float
    """Time in the step that is not finished."""
