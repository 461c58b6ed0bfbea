"""Time work on a device that is so short that one run says little."""

from collections.abc import Callable
from statistics import median

from tools.bench.gpu.check_table import Bench
from tools.bench.timing import seconds_of, synchronised_clock


def seconds_each(work: Callable[[], object], bench: Bench, repeats: int = 10, rounds: int = 5) -> float:
    """Median over `rounds` of the mean seconds of `repeats` runs, after two runs that are not timed."""
    if bench.tiny:
        return seconds_of(work, synchronised_clock(bench.device))
    work()
    work()

    def many() -> None:
        for _ in range(repeats):
            work()

    clock = synchronised_clock(bench.device)
    return median(seconds_of(many, clock) for _ in range(rounds)) / repeats
