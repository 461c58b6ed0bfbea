"""Torn lines, withdrawn lines, strict JSON."""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tracking.journal import Journal, Tail, changed_versions, read_events, step_events


def test_every_cut_keeps_the_whole_lines_and_only_those(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, 1) as journal:
        journal.write("attempt", step=0, total_steps=4)
        for step in range(1, 5):
            journal.write("step", step=step, loss=1 / step, note="grün {}")
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        whole = data[:cut].count(b"\n")
        path.write_bytes(data[:cut])
        assert len(read_events(path)) == whole
        with Journal(path, 2) as journal:
            journal.write("event", level="info", message="resumed")
        lines = path.read_bytes().splitlines(keepends=True)
        assert b"".join(lines[:-1]) == b"".join(data.splitlines(keepends=True)[:whole])
        assert [json.loads(line)["kind"] for line in lines][whole:] == ["event"]


@pytest.mark.parametrize("last", [b'{"kind":"st\n', b"\0\0\0\n", b"[1]\n", b"\xff\n", b"\n", b'{"kind":"step"}'])
def test_a_bad_last_line_is_cut_and_a_bad_line_in_the_middle_stays(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    middle = b'{"kind":"step","step":1}\nrubbish\n{"kind":"step","step":2}\n'
    path.write_bytes(middle + last)
    Journal(path, 2).close()
    assert path.read_bytes() == middle
    assert [event["step"] for event in read_events(path)] == [1, 2]


@given(st.lists(st.integers(0, 60), max_size=12), st.binary(max_size=12))
def test_a_follower_sees_each_line_once_through_tears_and_cuts(sizes: list[int], rubbish: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        tail, seen = Tail(path), []
        assert tail.poll() == []
        for attempt, size in enumerate(sizes, 1):
            with Journal(path, attempt) as journal:
                journal.write("step", step=attempt, pad="x" * size)
                seen += tail.poll()
            with path.open("ab") as file:
                file.write(rubbish.replace(b"\n", b" "))
            seen += tail.poll()
        assert [event["step"] for event in seen] == list(range(1, len(sizes) + 1))


def test_a_follower_is_not_moved_by_the_cut_of_a_bad_line_that_has_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"kind":"step","step":1}\n\0\0\0\0\0\0\n')
    tail = Tail(path)
    assert len(tail.poll()) == 1
    with Journal(path, 2) as journal:
        journal.write("step", step=2)
    assert [event["step"] for event in tail.poll()] == [2]


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, 1) as journal:
        journal.write("step", step=np.int64(3), loss=math.nan, lr=np.float32("inf"), deep={"a": [-math.inf, 1.5]})
        with pytest.raises(AttributeError):
            journal.write("step", step=4, loss=object())

    def refuse(word: str) -> None:
        raise AssertionError(word)

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert (raw["loss"], raw["lr"], raw["deep"]) == ("NaN", "Infinity", {"a": ["-Infinity", 1.5]})
    (event,) = read_events(path)
    assert event["step"] == 3
    assert math.isnan(event["loss"])
    assert event["lr"] == math.inf
    assert event["deep"]["a"][0] == -math.inf


def test_a_rewind_withdraws_what_lies_beyond_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, 1) as journal:
        for step in range(1, 9):
            journal.write("step", step=step, loss=1.0)
            if step % 2 == 0:
                journal.write("evaluate", step=step, metrics={"loss": 1.0})
        assert journal.has("evaluate", 8)
    with Journal(path, 2) as journal:
        assert journal.has("evaluate", 8)  # the new attempt has not written its step yet
        journal.write("attempt", step=4, total_steps=8)
        assert journal.has("evaluate", 4)
        assert not journal.has("evaluate", 6)
        journal.write("step", step=5, loss=2.0)
        journal.write("step", step=5, loss=3.0)
        journal.write("evaluate", step=6, metrics={})
    with Journal(path, 3) as journal:
        assert journal.has("evaluate", 6)
    found = step_events(read_events(path))
    assert list(found) == [1, 2, 3, 4, 5]
    assert found[5]["loss"] == 3.0


def test_lines_of_two_processes_do_not_mix(tmp_path: Path) -> None:
    """An overtaken attempt may write its last lines while the next attempt runs."""
    path = tmp_path / "journal.jsonl"
    program = (
        "import sys; from pipeline.tracking.journal import Journal\n"
        "j = Journal(sys.argv[1], int(sys.argv[2]))\n"
        "print('open', flush=True), sys.stdin.readline()\n"
        "[j.write('step', step=i, pad='y' * (i % 300)) for i in range(400)]"
    )
    command, pipes = [sys.executable, "-c", program, str(path)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    both = [subprocess.Popen([*command, attempt], text=True, **pipes) for attempt in ("1", "2")]
    assert [process.stdout.readline() for process in both] == ["open\n"] * 2  # else one is done before the other starts
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(400) for process in both] == [0, 0]
    assert len(read_events(path)) == len(path.read_bytes().splitlines()) == 800


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    """A limit on the file size acts like a full disk: write() writes only a part of the line."""
    program = (
        "import resource, sys; from pipeline.tracking.journal import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "j = Journal(sys.argv[1], 1)\n"
        "[j.write('step', step=i, pad='z' * 50) for i in range(40)]"
    )
    path = tmp_path / "journal.jsonl"
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert "the journal line could not be written whole" in result.stderr
    assert path.read_bytes().endswith(b"}\n")
    assert len(read_events(path)) == path.read_bytes().count(b"\n") > 5


def test_time_and_attempt_are_stamped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    before = time.time()
    with Journal(path, 7) as journal:
        journal.write("event", level="info", message="x")
    (event,) = read_events(path)
    assert event["attempt"] == 7
    assert before - 1 < event["time"] < time.time() + 1


def test_other_versions_than_the_last_attempts_are_told(tmp_path):
    path = tmp_path / "journal.jsonl"
    now = {"torch": "2.13", "numpy": "2.1", "numba": "0.61"}
    assert changed_versions(path, now) == []
    with Journal(path, 1) as log:
        log.write("attempt", step=0, versions={"torch": "2.12", "numpy": "2.1", "ffcv": "1.0"})
        log.write("attempt", step=0)
    assert changed_versions(path, now) == [
        "ffcv was 1.0, now it is absent", "numba was absent, now it is 0.61", "torch was 2.12, now it is 2.13",
    ]  # fmt: skip


def test_what_a_replaced_attempt_still_writes_does_not_count(tmp_path):
    """A suspended machine wakes up after the next attempt has begun."""
    path = tmp_path / "journal.jsonl"
    with Journal(path, 1) as old, Journal(path, 2) as new:
        old.write("step", step=1, loss=1.0)
        old.write("step", step=2, loss=0.9)
        new.write("attempt", step=1)
        new.write("step", step=2, loss=0.5)
        old.write("step", step=3, loss=0.8)
        old.write("rollback", step=0)
        new.write("step", step=3, loss=0.4)
    assert {step: event["loss"] for step, event in step_events(read_events(path)).items()} == {1: 1.0, 2: 0.5, 3: 0.4}


def test_what_has_not_changed_is_not_written_again_by_this_attempt_or_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for attempt, packages in enumerate([{"torch": "1"}, {"torch": "1"}, {"torch": "2"}], 1):
        with Journal(path, attempt) as journal:
            for _ in range(2):
                journal.write_changed("environment", packages=packages, cores=(0, 1), load=math.inf)
    assert [(e["attempt"], e["packages"]["torch"]) for e in read_events(path)] == [(1, "1"), (3, "2")]
