"""Name the ranks that the others wait for, and recognise a lost peer. tests/multiprocess/test_health.py runs ranks."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from pipeline import run
from pipeline.distributed.world import World
from pipeline.health import watchdog as watchdog_module
from pipeline.health.watchdog import Beat, Watchdog, blame, is_broken_collective
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from tests.support import make_tiny_run


def beats(*changes: dict) -> dict[int, Beat]:
    return {
        rank: Beat(**{"rank": rank, "host": f"n{rank}", "pid": 1, "moves": 50, "step": 7, "phase": "synchronise",
                      "still_seconds": 60.0, "allowed_seconds": 60.0, **change})
        for rank, change in enumerate(changes)
    }  # fmt: skip


def test_who_made_the_fewest_moves_is_to_blame():
    sentence, step = blame(beats({}, {"moves": 48, "phase": "data", "still_seconds": 61.0}, {}), [])
    assert sentence == (
        "rank 1 on n1 has been in data of step 7 for 61 s; ranks 0, 2 waited for it in synchronise of step 7"
    )
    assert step == 7


def test_who_may_take_longer_is_waited_for():
    assert blame(beats({}, {"moves": 48, "phase": "save", "allowed_seconds": 300.0}), []) is None
    assert blame(beats({}, {"moves": 48, "phase": "save", "allowed_seconds": 300.0, "still_seconds": 301.0}), [])


def test_silence_is_blamed_however_far_a_rank_has_come():
    sentence, _ = blame(beats({"moves": 40}, {"phase": "update", "step": 6, "allowed_seconds": 300.0}), [1])
    assert sentence.startswith("rank 1 on n1 gave no sign of life after update of step 6; rank 0 waited for it")


def test_all_at_the_same_place_is_the_collective():
    assert "a collective between them hangs" in blame(beats({}, {}), [])[0]
    assert blame(beats({}), [])[0] == "rank 0 on n0 has been in synchronise of step 7 for 60 s"


def test_a_standstill_is_told_once_with_stacks_and_progress_is_not(tmp_path, monkeypatch):
    """Its clock runs as this test says, so that a machine which stands still for a second decides nothing."""
    told, told_at, now = [], threading.Event(), [0.0]
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))

    def on_stall(sentence: str, step: int) -> None:
        told.append((sentence, step))
        told_at.set()

    def pass_time() -> None:
        """50 ms, after which the watching thread looks, or has told, before this returns."""
        now[0], beat, waited = now[0] + 0.05, watchdog.beat_file.read_bytes(), 0
        while watchdog.beat_file.read_bytes() == beat and not told_at.wait(0.001):
            waited += 1
            assert waited < 300_000, "the watching thread looks no more"

    with Watchdog(tmp_path / "calm", 0, 1, 1.0, on_stall) as watchdog:
        for step in range(1, 30):
            list(watchdog.batches([1, 2], step))
            pass_time()
        assert not told
        watchdog.phase("data", 30)
        for _ in range(40):  # 2 s
            pass_time()
        assert told_at.wait(300)
    [(sentence, step)] = told
    assert "has been in data of step 30 for 1 s" in sentence
    assert step == 30
    assert "test_watchdog.py" in (tmp_path / "calm" / "rank-00000.stacks").read_text()


def test_patience_is_for_the_first_step_and_for_what_shows_no_progress(tmp_path):
    def of(moves):
        with Watchdog(tmp_path, 0, 1, 10.0, print) as watchdog:
            for name, step in moves:
                watchdog.phase(name, step)
        return json.loads(watchdog.beat_file.read_bytes())["allowed_seconds"]

    assert of([]) == 50
    assert of([("data", 5), ("update", 5)]) == 50
    assert of([("synchronise", 0), ("data", 1)]) == 50, "the ranks meet before the first step"
    assert of([("synchronise", 0), ("data", 1), ("synchronise", 1)]) == 50
    assert of([("synchronise", 0), ("data", 1), ("synchronise", 2)]) == 10
    assert of([("data", 5), ("data", 6)]) == 10
    assert of([("data", 5), ("data", 6), ("save", 6)]) == 50


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (ConnectionResetError("a tracking server"), False),
    ],
)
def test_what_a_lost_peer_looks_like(error, broken):
    assert is_broken_collective(error) is broken
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert is_broken_collective(wrapped) is broken


def test_the_beat_that_other_nodes_wait_for_is_flushed(tmp_path, monkeypatch):
    flushed, beat = [], tmp_path / "rank-00000.beat"
    monkeypatch.setattr(watchdog_module.os, "fsync", lambda file: flushed.append(json.loads(beat.read_bytes())))
    with Watchdog(tmp_path, 0, 1, 60.0, print):
        assert flushed == []
    assert [seen["left"] for seen in flushed] == [True]


def test_a_standstill_ends_the_process_whatever_its_stage_says(tmp_path, monkeypatch):
    """Also when a newer attempt has claimed the stage, or the outcome cannot be written."""
    stage = Stage(make_tiny_run(tmp_path) / "pretrain")
    stage.attempts.claim(world_size=1)
    left = []
    monkeypatch.setattr(run, "exit_rank", left.append)
    end = run._watchdog(stage, World.alone())._on_stall
    (stage.directory / "attempts" / "000002.json").write_text("{}")
    end("rank 0 stands still", 3)
    (stage.directory / "attempts").rename(stage.directory / "gone")
    (stage.directory / "attempts").touch()
    end("rank 0 stands still", 3)
    assert left == 2 * [Outcome(OutcomeKind.BAD_NODE, "rank 0 stands still", 3)]
