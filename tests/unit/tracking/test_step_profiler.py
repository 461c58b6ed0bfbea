"""Requests for profiles: answered once, by the rank and the attempt that are meant, with a trace of the right steps."""

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from pipeline.distributed.world import World
from pipeline.storage.file_names import PROFILE_REQUEST_FILE, PROFILES_FOLDER
from pipeline.storage.folder import Folder, json_bytes, write_json
from pipeline.tracking.step_profiler import MOST_REQUEST_BYTES, ProfileRequest, StepProfiler, write_gzipped_json
from tests.support import fcmae, make_tiny_run, weights_sha256, write_tiny_recipe

REQUEST = ProfileRequest(id="one", attempt=3, steps=2)


def train(profiler: StepProfiler, steps: range, every: int = 2) -> None:
    """As the trainer does: look for a request whenever the journal is flushed."""
    for step in steps:
        if step % every == 0:
            profiler.poll(step)
        torch.ones(64).mul(step + 1)
        profiler.end_step(step + 1)


def profiler_of(place: Path, attempt: int = 3, rank: int = 0) -> StepProfiler:
    return StepProfiler(Folder.at(place), attempt, replace(World.alone(), rank=rank))


def answers(place: Path) -> dict[str, dict]:
    return {str(path.relative_to(place)): json.loads(path.read_text()) for path in place.glob("*/rank-?????.json")}


def test_a_request_is_answered_once_with_a_trace_of_its_steps(tmp_path):
    profiler = profiler_of(tmp_path)
    train(profiler, range(4))
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / PROFILE_REQUEST_FILE, asdict(REQUEST))
    train(profiler, range(4, 10))
    (answer,) = answers(tmp_path).values()
    assert answer["steps"] == [5, 6]
    assert answer["files"] == ["rank-00000.trace.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "one" / answer["files"][0]).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert {"step 5", "step 6", "aten::mul", "[memory]"} <= set(names)
    assert "step 7" not in names
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train(profiler, range(10, 20))
    train(profiler_of(tmp_path, attempt=4), range(20, 30))  # the attempt after a restart
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("rank", [-1, 1.0, "0", True, [0]])
def test_an_odd_rank_asks_nobody(rank):
    assert ProfileRequest.parse(json_bytes({**asdict(REQUEST), "rank": rank}), "a request") is None
    assert ProfileRequest.parse(json_bytes(asdict(REQUEST)), "a request") == REQUEST


@pytest.mark.parametrize("place", ["{tmp}", "memory://profiles"])
def test_a_file_that_is_too_long_for_a_request_is_not_read(place, tmp_path):
    folder = Folder.at(place.format(tmp=tmp_path))
    folder.publish(PROFILE_REQUEST_FILE, json_bytes(asdict(REQUEST)).ljust(MOST_REQUEST_BYTES))
    assert ProfileRequest.parse(folder.read(PROFILE_REQUEST_FILE, MOST_REQUEST_BYTES), "a request") == REQUEST
    folder.publish(PROFILE_REQUEST_FILE, json_bytes(asdict(REQUEST)).ljust(MOST_REQUEST_BYTES + 1))
    with pytest.raises(ValueError, match="it holds more than"):
        folder.read(PROFILE_REQUEST_FILE, MOST_REQUEST_BYTES)


def test_only_the_rank_that_is_asked_answers(tmp_path):
    write_json(tmp_path / PROFILE_REQUEST_FILE, asdict(replace(REQUEST, rank=1)))
    for rank in range(3):
        train(profiler_of(tmp_path, rank=rank), range(6))
    assert [answer["rank"] for answer in answers(tmp_path).values()] == [1]


def test_an_attempt_that_ends_first_says_so(tmp_path):
    write_json(tmp_path / PROFILE_REQUEST_FILE, asdict(replace(REQUEST, steps=100)))
    profiler = profiler_of(tmp_path)
    train(profiler, range(6))
    profiler.close()
    (answer,) = answers(tmp_path).values()
    assert answer["error"] == "the attempt ended before 100 steps were recorded"
    torch.autograd.profiler.profile().__enter__().__exit__(None, None, None)  # the last one was stopped


def test_a_profile_that_cannot_be_written_is_a_note(tmp_path, capsys):
    write_json(tmp_path / PROFILE_REQUEST_FILE, asdict(REQUEST))
    (tmp_path / "one").write_text("in the way of the folder")
    train(profiler_of(tmp_path), range(6))
    assert f"a profile was not written to {tmp_path}/one" in capsys.readouterr().err


def test_a_profiler_that_fails_between_its_start_and_its_first_mark_is_stopped(tmp_path, monkeypatch):
    write_json(tmp_path / PROFILE_REQUEST_FILE, asdict(REQUEST))
    profiler = profiler_of(tmp_path)

    def refuse(name: str) -> None:
        raise RuntimeError(f"no mark {name}")

    with monkeypatch.context() as patched:
        patched.setattr(torch.profiler, "record_function", refuse)
        train(profiler, range(6))
    (answer,) = answers(tmp_path).values()
    assert answer["error"] == "no mark step 1"
    assert not torch.autograd._profiler_enabled()


def test_a_snapshot_is_the_same_json_in_pieces(tmp_path):
    frames = [{"filename": 'a "quoted".py', "line": 3, "name": "é"}]
    entries = [{"action": "alloc", "addr": 2**47, "frames": frames, "pool_id": (0, 1)}] * 3
    snapshot = {"segments": [], "device_traces": [[], entries], "allocator_settings": {"a": None, "b": torch.float32}}
    write_gzipped_json(tmp_path / "snapshot", snapshot)
    assert gzip.decompress((tmp_path / "snapshot").read_bytes()).decode() == json.dumps(snapshot, default=str)


ODD = [b"", b"[]", b"{", b'{"id":"../x","attempt":3,"steps":2}', b'{"id":"a","attempt":3,"steps":0}']


@pytest.mark.parametrize("content", [*ODD, b'{"id":"a","attempt":3,"steps":1e9}', b'{"id":"a","steps":2}'])
def test_odd_requests_count_as_absent(tmp_path, content):
    (tmp_path / PROFILE_REQUEST_FILE).write_bytes(content)
    train(profiler_of(tmp_path), range(6))
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE_REQUEST_FILE]


def test_an_object_store_is_read_beside_the_training():
    folder = Folder.at("memory://profiles-of-a-run")
    folder.publish(PROFILE_REQUEST_FILE, json.dumps(asdict(REQUEST)).encode())
    profiler = StepProfiler(folder, 3, World.alone())
    train(profiler, range(2))
    profiler._reading.join()
    train(profiler, range(2, 10))
    names = sorted((folder / "one").entries())
    assert names == ["rank-00000.json", "rank-00000.trace.json.gz"]


@pytest.mark.slow
def test_training_hands_on_the_same_weights_with_and_without_profiles(tmp_path):
    changes = ["stages.intermediate=null", "stages.finetune=null", "stages.pretrain.schedule.epochs=1"]
    profiled = make_tiny_run(tmp_path, changes) / "pretrain"
    write_json(profiled / PROFILES_FOLDER / PROFILE_REQUEST_FILE, asdict(replace(REQUEST, attempt=1)))
    for run in (profiled.parent, tmp_path / "plain"):
        done = fcmae("run", write_tiny_recipe(tmp_path, changes), "--out", run)
        assert done.returncode == 0, done.stderr
    (answer,) = answers(profiled / PROFILES_FOLDER).values()
    assert answer["steps"] == [1, 2]
    assert weights_sha256(profiled) == weights_sha256(tmp_path / "plain" / "pretrain")
