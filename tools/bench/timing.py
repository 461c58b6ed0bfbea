"""Timing for the benchmarks: clocks, and medians of works that take turns."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Clock = Callable[[], float]
"""Seconds from any fixed moment."""


def synchronised_clock(device: torch.device) -> Clock:
    """Wall time; on a GPU it is read after all queued work is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def quiet_clock(device: torch.device) -> Clock:
    """CPU time of this process on a CPU, because other work on the machine hardly changes it; wall time on a GPU."""
    return synchronised_clock(device) if device.type == "cuda" else time.process_time


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds_of(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Do the work once and return the seconds that it took."""
    began = clock()
    work()
    return clock() - began


def medians(works: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, float]:
    """Median seconds of each work. They take turns, so that other work on the machine disturbs all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = seconds_of(work, clock)
            if number:  # the first round compiles and makes buffers
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def print_row(cells: Sequence[object]) -> None:
    """Print a row of a Markdown table at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(columns: Sequence[str]) -> None:
    """Print the header of a Markdown table."""
    print_row(columns)
    print(f"|{'---|' * len(columns)}", flush=True)
