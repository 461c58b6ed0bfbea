"""Differences between two arms of a study, seed by seed, with a confidence interval.

Arms with the same seed see the same images in the same order from the same initial weights where their shapes agree, so
their difference varies less than each arm does. The interval is Student's t over the paired seeds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

LEVEL = 0.95  # of the intervals: of twenty pairs of equal arms one is expected to exclude zero


@dataclass(frozen=True)
class PairedDifference:
    """An arm minus another one, for each seed that both have finished."""

    arm: str
    minus: str
    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(
        cls, arm: str, minus: str, metric: str, own: Mapping[int, float], their: Mapping[int, float]
    ) -> "PairedDifference":
        """The difference of two arms' results by seed."""
        seeds = tuple(seed for seed in own if seed in their)
        return cls(arm, minus, metric, seeds, tuple(own[seed] - their[seed] for seed in seeds))

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the mean difference at LEVEL; None for fewer than two seeds."""
        count = len(self.values)
        if count < 2:
            return None
        half = student_t(LEVEL, count - 1) * stdev(self.values) / math.sqrt(count)
        return fmean(self.values) - half, fmean(self.values) + half

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@cache
def student_t(level: float, freedom: int) -> float:
    """The value that Student's t stays below in magnitude with probability `level`: 2.776 for 0.95 and 4 degrees."""
    low, high = 0.0, math.pi / 2
    while (angle := (low + high) / 2) not in (low, high):
        low, high = (angle, high) if _share_within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _share_within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd, cosine = freedom % 2, math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
