"""Bad steps and ranks that stand still, in real processes."""

import contextlib
import functools
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.stage.directory import Stage
from pipeline.stage.environment import program_id
from pipeline.stage.outcome import OutcomeKind
from pipeline.tracking import journal
from tests.engines import ENGINES
from tests.processes import run_stage, start_stage
from tests.support import make_tiny_run, wait_for_step, weights_sha256

HOST = socket.gethostname()
STATISTICS = [
    "defaults.health.statistics_steps=4", "defaults.health.rollback_after=2", "defaults.health.window_steps=4",
    "defaults.health.skip_before=2", "stages.finetune.schedule.epochs=4", "stages.finetune.schedule.warmup_epochs=1",
    "defaults.tracking.log_every_steps=3", "stages.pretrain=null", "stages.intermediate=null",
]  # fmt: skip
# A lone NaN and a lone spike; then two in a row, for which the stage goes back to step 10.
BAD_BATCHES = {"poison": {"3": "nan", "9": 1e6, "15": "nan", "16": 1e6}}


def make_stage(directory: Path, *overrides: str) -> Path:
    return make_tiny_run(directory, [*STATISTICS, "defaults.checkpoint.keep_best=false", *overrides]) / "finetune"


def events(stage: Path) -> list[dict]:
    return journal.read_events(stage / "journal.jsonl")


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Callable[[int], Path]:
    """The stage on so many ranks that met the bad batches and was not interrupted."""

    @functools.cache
    def made(processes: int) -> Path:
        stage = make_stage(tmp_path_factory.mktemp("anomalies"))
        assert run_stage(stage, processes, BAD_BATCHES).kind is OutcomeKind.DONE
        return stage

    return made


on_one_and_two_ranks = pytest.mark.parametrize("processes", [1, 2])


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bad_steps_are_refused_and_too_many_take_the_stage_back(references, processes):
    assert_refused_and_taken_back(references(processes))


@pytest.mark.slow
def test_a_late_journal_has_no_step_between_a_rollback_and_the_steps_after_it(tmp_path):
    stage = make_stage(tmp_path, "defaults.tracking.log_every_steps=1")
    assert run_stage(stage, 1, {**BAD_BATCHES, "late": True}).kind is OutcomeKind.DONE
    assert_refused_and_taken_back(stage)


def assert_refused_and_taken_back(stage: Path, norm: str = "nan") -> None:
    found = events(stage)
    refused = [e["step"] for e in found if e["kind"] == "step" and e.get("refused")]
    assert refused == [3, 9, 15, 16]
    told = [e["message"] for e in found if e["kind"] == "event"]
    assert told[0] == f"step 3 was skipped: its loss is nan, its gradient norm {norm}"
    [rollback] = [e for e in found if e["kind"] == "rollback"]
    assert (rollback["step"], rollback["left_out"], rollback["rollbacks"]) == (10, [13, 16], 1)
    assert "2 steps from 15 to 16" in rollback["reason"]
    again = found[found.index(rollback) :]
    assert [e["step"] for e in again if e["kind"] == "step"] == [11, 12, *range(17, 25)]
    assert list(journal.step_events(found)) == [*range(1, 13), *range(17, 25)]
    assert Stage(stage).done().step == 24


@pytest.mark.slow
@on_one_and_two_ranks
def test_a_rollback_is_as_if_the_steps_had_never_been(references, processes, tmp_path):
    plain = make_stage(tmp_path)
    assert run_stage(plain, processes, {**BAD_BATCHES, "left_out": [[13, 16]]}).kind is OutcomeKind.DONE
    assert not [e for e in events(plain) if e["kind"] == "rollback"]
    assert weights_sha256(plain) == weights_sha256(references(processes))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_every_engine_refuses_and_goes_back_like_ddp(references, engine, tmp_path):
    settings = [f"defaults.engine.{key}={value}" for key, value in ENGINES[engine].items()]
    stage, plain = make_stage(tmp_path / "stage", *settings), make_stage(tmp_path / "plain", *settings)
    assert run_stage(stage, 2, BAD_BATCHES).kind is OutcomeKind.DONE
    assert_refused_and_taken_back(stage, norm="nan" if engine == "fsdp" else "inf")  # ZeRO does not tell them apart
    losses, expected = (
        [event["loss"] for event in journal.step_events(events(s)).values() if not event.get("refused")]
        for s in (stage, references(2))
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert run_stage(plain, 2, {**BAD_BATCHES, "left_out": [[13, 16]]}).kind is OutcomeKind.DONE
    assert weights_sha256(plain) == weights_sha256(stage)


@pytest.mark.slow
@on_one_and_two_ranks
def test_killed_at_random_moments_it_ends_with_the_same_bits(references, processes, tmp_path, seed):
    """Also saved by SIGTERM, at a step where the undisturbed run has no checkpoint."""
    stage, chance = make_stage(tmp_path), random.Random(seed)
    for attempt, how in enumerate(chance.sample([signal.SIGKILL, signal.SIGTERM], 2), start=1):
        # Steps are journalled by threes: the second attempt has some to tell, wherever the first was saved.
        process = start_stage(stage, processes, {**BAD_BATCHES, "hold": {"finetune": 16 + 4 * attempt}})
        wait_for_step(stage, chance.randint(1, 17), attempt)
        time.sleep(chance.uniform(0, 0.3))
        if how is signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        process.communicate(400)
    process = start_stage(stage, processes, BAD_BATCHES)
    assert process.wait(400) == 0, process.said()
    assert weights_sha256(stage) == weights_sha256(references(processes)), [
        e for e in events(stage) if e["kind"] in ("attempt", "rollback")
    ]


@pytest.mark.slow
def test_after_the_last_rollback_it_ends_with_a_sentence(tmp_path):
    faults = {"poison": {str(step): "nan" for step in range(7, 25)}}
    outcome = run_stage(make_stage(tmp_path, "defaults.health.max_rollbacks=2"), 1, faults)
    assert outcome.kind is OutcomeKind.PERMANENT
    assert "2 steps from 11 to 12 had a loss or gradient norm that is not finite or far above the last ones, after 2 "\
        "rollbacks (health.max_rollbacks)" in outcome.reason  # fmt: skip
    assert "\n" not in outcome.reason
    rollbacks = [(e["step"], e["left_out"]) for e in events(tmp_path / "run" / "finetune") if e["kind"] == "rollback"]
    assert rollbacks == [(0, [5, 8]), (5, [7, 10])]


def test_an_error_of_a_gpu_is_recorded_with_its_node_and_program(tmp_path):
    stage = make_stage(tmp_path)
    outcome = run_stage(stage, 2, {"rank": 1, "gpu_error": {"4": 700}})
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert outcome.reason.startswith(f"a GPU of {HOST} failed: CUDA error: an illegal memory access was encountered")
    (error,) = Stage(stage).attempts.device_errors()
    assert (error.node, error.code, error.hardware, error.attempt) == (HOST, 700, False, 1)
    assert error.program == program_id(stage)


WATCHED = ["defaults.health.stall_seconds=4", "defaults.tracking.log_every_steps=1"]


@pytest.fixture(scope="module")
def compiled(references):
    """The decoder, which numba keeps: after a fresh clone it takes longer than a first step of WATCHED may."""
    references(2)


def slow_from(step: int) -> dict[str, float]:
    """Steps that give a test the time to disturb a stage, though never as long as a standstill."""
    return {str(number): 2.5 for number in range(step, 25)}


def stacks(stage: Path, rank: int, attempt: int = 1) -> str:
    return (stage / "health" / f"{attempt:06d}" / f"rank-{rank:05d}.stacks").read_text()


def processes_of(stage: Path) -> list[str]:
    """The command lines of those that write to the logs of the stage: its ranks and their sentinels."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if Path(os.readlink(process / "fd" / "1")).parent == stage / "logs":
                found.append((process / "cmdline").read_text())
    return found


def assert_all_gone(stage: Path) -> None:
    """Sentinels die of their rank's death, which takes them a moment."""
    assert [command for command in processes_of(stage) if "sentinel" not in command] == []
    deadline = time.monotonic() + 60
    while processes_of(stage):
        assert time.monotonic() < deadline, "somebody is left"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.usefixtures("compiled")
def test_a_frozen_rank_is_named_and_the_run_resumes_to_the_same_bits(references, tmp_path, frozen, seed):
    stage = make_stage(tmp_path, *WATCHED)
    process = start_stage(stage, 2, {**BAD_BATCHES, "rank": frozen, "sleep": slow_from(11)})
    wait_for_step(stage, random.Random(seed).randint(4, 9))
    os.kill(process.children()[frozen], signal.SIGSTOP)
    reached = max(event.get("step", 0) for event in events(stage))  # now: it is woken once more, to show its stacks
    said, _ = process.communicate(400)
    assert process.returncode == 76, said
    assert f"rank {frozen} on {HOST} gave no sign of life after" in said
    outcome = Stage(stage).attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert reached <= outcome.step <= reached + 2
    assert f"rank {1 - frozen} waited for it in" in outcome.reason
    for rank in (0, 1):
        assert "pipeline/training/trainer.py" in stacks(stage, rank)
    assert_all_gone(stage)
    assert run_stage(stage, 2, BAD_BATCHES).kind is OutcomeKind.DONE
    assert weights_sha256(stage) == weights_sha256(references(2))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_rank_that_hangs_in_its_data_is_named(references, tmp_path):
    stage = make_stage(tmp_path, *WATCHED)
    outcome = run_stage(stage, 2, {**BAD_BATCHES, "rank": 1, "sleep": {"8": 1000}})
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert outcome.step == 8
    assert f"rank 1 on {HOST} has been in data of step 8 for" in outcome.reason
    assert "rank 0 waited for it in synchronise of step 8" in outcome.reason
    assert "tests/faulty_rank.py" in stacks(stage, 1)
    assert_all_gone(stage)
    assert run_stage(stage, 2, BAD_BATCHES).kind is OutcomeKind.DONE
    assert weights_sha256(stage) == weights_sha256(references(2))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_rank_stuck_in_c_code_is_named_and_shows_its_stack(tmp_path):
    stage = make_stage(tmp_path, *WATCHED)
    outcome = run_stage(stage, 2, {"rank": 1, "hang": 8})
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert f"rank 1 on {HOST} gave no sign of life after" in outcome.reason
    assert "tests/faulty_rank.py" in stacks(stage, 1)
    assert_all_gone(stage)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_single_rank_stuck_in_c_code_is_ended_and_named(tmp_path):
    stage = make_stage(tmp_path, *WATCHED)
    process = start_stage(stage, 1, {"rank": 0, "hang": 8, "sleep": {"7": 1}})  # several beats tell of step 7
    said, _ = process.communicate(400)
    assert process.returncode == 76, said
    sentence = f"rank 0 on {HOST} gave no sign of life for 8 s after"
    assert sentence in said
    outcome = Stage(stage).attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert outcome.reason.startswith(sentence)
    assert outcome.step in (7, 8)  # the last beat may be older than the last move
    assert "tests/faulty_rank.py" in stacks(stage, 0)
    assert_all_gone(stage)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL], ids=lambda blow: blow.name)
def test_a_rank_on_another_host_is_named(tmp_path, blow):
    """Two host names, so the ranks know of one another what the files of the stage say, and no more."""
    stage = make_stage(tmp_path, *WATCHED)
    process = start_stage(stage, 2, {"hosts": {"0": "node-a", "1": "node-b"}, "rank": 1, "sleep": slow_from(7)})
    wait_for_step(stage, 5)
    os.kill(process.children()[1], blow)
    said, _ = process.communicate(400)
    assert process.returncode == 76, said
    outcome = Stage(stage).attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    if blow is signal.SIGSTOP:
        assert "rank 1 on node-b gave no sign of life after" in outcome.reason
        assert "; rank 0 waited for it in" in outcome.reason
        assert "pipeline/training/trainer.py" in stacks(stage, 0)
    else:
        assert "rank 1 on node-b was lost in" in outcome.reason
    assert_all_gone(stage)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_slow_rank_raises_no_alarm(references, tmp_path):
    """It is looked at after half the time of a standstill, of which a busy machine must not add the other half."""
    stage = make_stage(tmp_path, "defaults.health.stall_seconds=20", "defaults.tracking.log_every_steps=1")
    outcome = run_stage(stage, 2, {**BAD_BATCHES, "rank": 1, "sleep": {"6": 11, "7": 11}})
    assert outcome.kind is OutcomeKind.DONE, outcome.reason
    assert weights_sha256(stage) == weights_sha256(references(2))


@pytest.mark.slow
def test_a_killed_rank_is_named_by_the_others(tmp_path):
    stage = make_stage(tmp_path, "defaults.tracking.log_every_steps=1")
    process = start_stage(stage, 2, {"rank": 1, "sleep": {"12": 400}})
    wait_for_step(stage, 7)
    os.kill(process.children()[1], signal.SIGKILL)
    said, _ = process.communicate(400)
    assert process.returncode == 76
    assert "rank 1 was killed by SIGKILL" in said
    outcome = Stage(stage).attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert f"rank 1 on {HOST} was lost in" in outcome.reason
