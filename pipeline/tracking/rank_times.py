"""Name the rank, or the node, that all others wait for: from the time that each rank computes and waits for its images.

All ranks need the same time for a step, because they meet in its collectives. So a slow rank shows only in what it does
alone: the forward passes of its blocks, which contain no collective under any engine, and its wait for images.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 5  # a rank is slow if it is the slowest in so many flushes of the journal in a row
NOTICEABLE = 0.1  # of the time of a step, which all others would save without it
REPORT_SECONDS = 600.0
SHOWN = 8  # ranks of a line in the journal, the slowest ones


class ForwardClock:
    """Measures how long the blocks of a model compute in their forward passes of training.

    On a GPU one step is measured between two calls of `take`, by events that no host waits for.

    Args:
        units: the blocks; under FSDP and ZeRO each of them gathers its parameters before the clock starts.
    """

    def __init__(self, units: Sequence[nn.Module], device: torch.device):
        self._cuda, self._on, self._steps, self._seconds = device.type == "cuda", False, 0, 0.0
        self._began: Any = None
        self._last = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for unit in units:
            unit.register_forward_pre_hook(self._begin)
            unit.register_forward_hook(self._end)

    def start_step(self) -> None:
        """Measure the step that begins."""
        self._on = not (self._cuda and self._events)

    def end_step(self) -> None:
        """The step is finished."""
        self._steps += self._on
        self._on = False

    def take(self) -> float:
        """Seconds per step since the last call; as before while a GPU still computes the step that was measured."""
        if self._events and not self._events[-1][1].query():
            return self._last
        seconds = self._seconds + sum(begin.elapsed_time(end) / 1000 for begin, end in self._events)
        steps, self._steps, self._seconds = max(self._steps, 1), 0, 0.0
        self._events.clear()
        self._last = seconds / steps
        return self._last

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, module: nn.Module, arguments: Any) -> None:
        if self._on and module.training:
            self._began = self._now()

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._on and module.training and self._began is not None:
            now, began, self._began = self._now(), self._began, None
            if self._cuda:
                self._events.append((began, now))
            else:
                self._seconds += now - began


@dataclass(frozen=True)
class Slow:
    """The ranks that the others wait for."""

    ranks: tuple[int, ...]
    lost: float
    """The part of the time of a step that the others would save if these were as fast as the slowest of the others."""
    share: float
    """Of all waiting, the part that is for these ranks."""


def slowest(computing: Tensor, data: Tensor, step_seconds: float, nodes: Sequence[str]) -> Slow | None:
    """Find the rank, or the node of several ranks, that costs the others most; None if none costs them noticeably.

    Args:
        computing: of each rank, seconds per step in the forward passes of its blocks: (ranks,).
        data: of each rank, seconds per step that it waited for images.
        nodes: of each rank.
    """
    if not bool((computing > 0).all()) or step_seconds <= 0:
        return None
    data = data.clamp(max=step_seconds)
    # Backward and update follow the forward pass, by a factor that is the same for all ranks. The slowest rank waits
    # for nobody, so it fills the step.
    own = data + computing * ((step_seconds - data) / computing).min()
    waiting = step_seconds - own
    best: Slow | None = None
    for ranks in _suspects(own, nodes):
        others = [rank for rank in range(len(own)) if rank not in ranks]
        if not others:
            continue
        saved = float(step_seconds - own[others].max())
        everybody = float(waiting.sum())
        share = min(saved * len(others) / everybody, 1.0) if everybody > 0 else 0.0
        # A node is named only if naming its slowest rank explains much less.
        if saved > NOTICEABLE * step_seconds and (best is None or saved > 1.5 * best.lost * step_seconds):
            best = Slow(tuple(ranks), saved / step_seconds, share)
    return best


def _suspects(own: Tensor, nodes: Sequence[str]) -> list[list[int]]:
    slowest_rank = int(own.argmax())
    node = [rank for rank, name in enumerate(nodes) if name == nodes[slowest_rank]]
    return [[slowest_rank], *([node] if len(node) > 1 else [])]


class RankTimes:
    """Shares the times of all ranks at each flush of the journal, and judges them on rank 0.

    Args:
        clock: of this rank's model.
        rank: this one.
        nodes: of each rank.
    """

    def __init__(self, clock: ForwardClock, rank: int, nodes: Sequence[str]):
        self._clock, self._rank, self.nodes = clock, rank, list(nodes)
        self._last: deque[Slow | None] = deque(maxlen=WINDOW)
        self._named: tuple[int, ...] = ()
        self._reported = float("-inf")

    def own(self, data_wait_seconds: float) -> Tensor:
        """This rank's times, float64 (2 * ranks,), to be summed over the ranks: zero but for two elements.

        Args:
            data_wait_seconds: this rank's wait for images per step, divided by the number of ranks.
        """
        times = torch.zeros(2, len(self.nodes), dtype=torch.float64)
        times[:, self._rank] = torch.tensor([self._clock.take(), data_wait_seconds * len(self.nodes)])
        return times.flatten()

    def judge(self, times: Tensor, step_seconds: float) -> tuple[dict[str, Any], str] | None:
        """The fields of the journal's line "ranks", if one is due, and a sentence if another rank is slow than before.

        Args:
            times: the sum of what `own` returned on all ranks.
        """
        if len(self.nodes) < 2:
            return None
        computing, data = times.view(2, -1)
        self._last.append(slowest(computing, data, step_seconds, self.nodes))
        culprits = Counter(slow.ranks if slow else () for slow in self._last)
        ranks, count = culprits.most_common(1)[0]
        if len(self._last) < WINDOW or count < WINDOW:
            ranks = self._named if self._named in culprits else ()
        changed, now = ranks != self._named, time.monotonic()
        if not changed and now - self._reported < REPORT_SECONDS:
            return None
        self._named, self._reported = ranks, now
        seen = [slow for slow in self._last if slow and slow.ranks == ranks]
        lost, share = (sum(getattr(s, name) for s in seen) / max(len(seen), 1) for name in ("lost", "share"))
        order = torch.argsort(computing + data, descending=True)[:SHOWN].tolist()
        slowest_times = [[rank, round(float(computing[rank]), 4), round(float(data[rank]), 4)] for rank in order]
        slow = self._sentence(ranks, computing, data, lost, share) if ranks else ""
        fields = {
            "slow": slow,
            "slow_ranks": list(ranks),
            "lost": round(lost, 3),
            "share_of_waiting": round(share, 3),
            "computing_median": round(float(computing.median()), 4),
            "data_median": round(float(data.median()), 4),
            "rank_computing_data": slowest_times,
        }
        return fields, (slow or "no rank is slower than the others any more") if changed else ""

    def _sentence(self, ranks: tuple[int, ...], computing: Tensor, data: Tensor, lost: float, share: float) -> str:
        node = self.nodes[ranks[0]]
        who = f"rank {ranks[0]} on {node}" if len(ranks) == 1 else f"node {node} (ranks {ranks[0]} to {ranks[-1]})"
        times = float(computing[list(ranks)].mean() / computing.median())
        why = f"computes {times:.1f} times as long as the median rank"
        if times < 1 + NOTICEABLE:
            why = f"waits {float(data[list(ranks)].mean()):.2f} s a step for its images"
        return f"{who} {why}: the others wait {lost:.0%} of each step for it, {share:.0%} of all waiting"
