"""A rank or node that all others wait for is named, in the journal and in the status."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from cluster.show.status import StageFollower
from cluster.show.status_table import run_table
from pipeline.engines import StepReport
from pipeline.stage.attempts import Attempts
from pipeline.tracking import rank_times
from pipeline.tracking.journal import Journal, read_events
from pipeline.tracking.rank_times import WINDOW, ForwardClock, RankTimes, slowest
from pipeline.tracking.step_log import StepLog
from tests.ranks import on_ranks


@pytest.mark.parametrize(
    ("computing", "data", "nodes", "ranks", "lost", "share"),
    [
        ([1, 1, 1, 1], [0, 0, 0, 0], "aabb", None, 0, 0),
        ([1, 2, 1, 1], [0, 0, 0, 0], "aabb", (1,), 0.5, 1.0),  # the others wait half of each step, for it alone
        ([1, 1.05, 1, 1], [0, 0, 0, 0], "aabb", None, 0, 0),  # too little to name it
        ([1, 2, 1, 1.6], [0, 0, 0, 0], "abcd", (1,), 0.2, 0.5),  # of 1.2 steps of waiting, 3 x 0.2 are for it alone
        ([1, 1, 2, 1.96], [0, 0, 0, 0], "aabb", (2, 3), 0.5, 0.98),  # a slow node: its other rank is as slow
        ([1, 1, 1, 1], [0, 4, 0, 0], "aabb", (1,), 0.4, 1.0),  # its images come late
        ([2, 2, 2, 2], [5, 5, 5, 5], "aaaa", None, 0, 0),  # all wait for their images
        ([2, 2], [0, 0], "aa", None, 0, 0),
        ([0, 1, 1, 1], [0, 0, 0, 0], "aabb", None, 0, 0),  # not measured yet
    ],
)
def test_the_slowest_rank_or_node_and_its_share_of_the_waiting(computing, data, nodes, ranks, lost, share):
    found = slowest(torch.tensor(computing, dtype=torch.float64), torch.tensor(data, dtype=torch.float64), 10.0, nodes)
    assert (found and found.ranks) == ranks
    if found:
        assert (found.lost, found.share) == pytest.approx((lost, share), abs=0.02)


def test_slow_for_a_moment_is_not_slow():
    times = RankTimes(ForwardClock([], torch.device("cpu")), 0, ["a", "b", "c"])
    even, late = torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([1.0, 1, 2, 0, 0, 0])
    flushes = [late, even] * WINDOW + [late] * WINDOW + [even] * 2 * WINDOW
    messages = [(times.judge(flush, 10.0) or ({}, ""))[1] for flush in flushes]
    named = {place: message for place, message in enumerate(messages) if message}
    assert list(named) == [3 * WINDOW - 1, 4 * WINDOW - 1]
    sentence = named[3 * WINDOW - 1]
    assert sentence.startswith("rank 2 on c computes 2.0 times as long as the median rank: the others wait 50% of")
    assert named[4 * WINDOW - 1] == "no rank is slower than the others any more"


def train(world, folder: Path, late: int, seconds: float) -> None:
    """Steps whose only collective is the journal's, on ranks of which one is slower, by a clock of each rank."""
    model, now = nn.Linear(8, 8), [0.0]
    forward = model.forward

    def slow_forward(x: torch.Tensor) -> torch.Tensor:
        now[0] += seconds if world.rank == late else seconds / 10
        return forward(x)

    model.forward = slow_forward
    rank_times.time = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    clock = ForwardClock([model], world.device)
    with Journal(folder / "journal.jsonl", 1) if world.is_main else nullcontext() as journal:
        ranks = RankTimes(clock, world.rank, world.gather(f"n{world.rank}"))
        log = StepLog(journal, world.sum, 1, 8, ranks)
        log.write("attempt", step=0, total_steps=99, world_size=world.size, global_batch=8)
        for step in range(1, 3 * WINDOW):
            clock.start_step()
            loss = model(torch.ones(8, 8)).mean().detach()
            clock.end_step()
            log.add(step, StepReport(loss.double(), loss, torch.ones((), dtype=torch.bool)), 0.1)
            log.flush()


def test_a_rank_of_four_that_computes_slowly_is_named_in_journal_and_status(tmp_path):
    stage = tmp_path / "pretrain"
    stage.mkdir()
    on_ranks(4, train, stage, 3, 0.2)
    events = read_events(stage / "journal.jsonl")
    (warning,) = [event for event in events if event["kind"] == "event"]
    assert warning["message"].startswith("rank 3 on n3 computes ")
    assert warning["step"] >= WINDOW
    line = [event for event in events if event["kind"] == "ranks"][-1]
    assert line["slow_ranks"] == [3]
    assert line["share_of_waiting"] == 1.0
    assert line["rank_computing_data"][0][0] == 3
    Attempts(stage, None).claim(world_size=4)
    follower = StageFollower(stage)
    follower.poll()
    assert follower.status().slow == warning["message"]
    console = Console(width=200, record=True)
    with console.capture() as text:
        console.print(run_table([follower.status()]))
    assert "pretrain, rank 3 on n3 computes " in text.get()
