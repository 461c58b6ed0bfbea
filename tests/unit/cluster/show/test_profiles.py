"""`fcmae profile` from the outside: what it waits for, and its sentences."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from cluster.show import profiles
from cluster.show.profiles import RequestedProfile
from pipeline.distributed.processes import start_time
from pipeline.distributed.world import World
from pipeline.errors import StageError
from pipeline.stage.attempts import Attempts
from pipeline.storage.file_names import PROFILE_REQUEST_FILE, PROFILES_FOLDER
from pipeline.storage.folder import Folder
from pipeline.tracking.step_profiler import StepProfiler
from tests.support import make_tiny_run, open_journal


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(profiles, "POLL_SECONDS", 0.02)
    return make_tiny_run(tmp_path)


def begin(stage: Path, world_size: int = 1) -> Attempts:
    """An attempt of this process, which lives."""
    attempts = Attempts(stage, None)
    attempts.claim(world_size)
    with open_journal(stage, attempts.own) as journal:
        journal.write("attempt", step=0, total_steps=100, world_size=world_size)
    return attempts


def test_the_folder_and_the_answers_of_a_running_stage(run):
    stage = run / "intermediate"
    attempts, ended = begin(stage), threading.Event()
    profiler = StepProfiler(Folder.at(stage / PROFILES_FOLDER), attempts.own, World.alone())

    def train() -> None:
        step = 0
        while not ended.is_set():
            profiler.poll(step)
            time.sleep(0.005)
            step += 1
            profiler.end_step(step)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        asked, shown = RequestedProfile(str(run), steps=3, rank=None), []
        (answer,) = asked.wait(shown.append)
    finally:
        ended.set()
        thread.join()
    assert shown[0].startswith("stage intermediate: 0 of 1 ranks have written 3 steps")
    first, last = answer["steps"]
    assert last == first + 2
    assert sorted(path.name for path in Path(str(asked.place)).iterdir()) == ["rank-00000.json", *answer["files"]]
    assert not (stage / PROFILES_FOLDER / PROFILE_REQUEST_FILE).exists()


def test_a_run_that_does_not_run_is_refused(run):
    with pytest.raises(StageError, match=r"is not running \(pretrain is waiting, .*\); profile it while it trains"):
        RequestedProfile(str(run), 5, None)


def test_a_rank_that_does_not_exist_is_refused(run):
    begin(run / "pretrain", world_size=2)
    with pytest.raises(StageError, match="--rank is 2, but stage pretrain runs on ranks 0 to 1; choose one"):
        RequestedProfile(str(run), 5, 2)


def test_an_attempt_that_ends_is_not_waited_for(run):
    attempts = begin(run / "pretrain")
    asked = RequestedProfile(str(run), 5, None)

    def end(_: str) -> None:
        owner = run / "pretrain" / "attempts" / f"{attempts.own:06d}.json"
        entry = {**json.loads(owner.read_text()), "pid_start_time": start_time(os.getpid()) - 1}
        owner.write_text(json.dumps(entry))  # as if this process had ended and its pid were another's

    with pytest.raises(StageError, match="stage pretrain stopped before it was profiled"):
        asked.wait(end)
    assert not (run / "pretrain" / PROFILES_FOLDER / PROFILE_REQUEST_FILE).exists()


def test_of_two_requests_the_later_one_counts(run):
    begin(run / "pretrain")
    first, second = (RequestedProfile(str(run), 5, None) for _ in range(2))
    other = b'{"id": "other"}'
    with pytest.raises(StageError, match="took the place of this one"):
        first.wait(lambda _: second._folder.publish(PROFILE_REQUEST_FILE, other))
    assert (run / "pretrain" / PROFILES_FOLDER / PROFILE_REQUEST_FILE).read_bytes() == other
