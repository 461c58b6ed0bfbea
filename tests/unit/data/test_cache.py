"""The machine's cache: entries are filled once, stay within the budget, and are never evicted while in use."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.cache import Cache, CancelledError
from pipeline.errors import DataError, RetryableError

SIZES = {"a": 10, "b": 25, "c": 40, "d": 50, "e": 90}
BUDGET = 80


def obtain(cache, name, size=None):
    size = SIZES[name] if size is None else size
    return cache.obtain(name, size, lambda d: (d / "data").write_bytes(bytes(size)) and None, is_sound)


def is_sound(directory):
    return (directory / "data").exists()


def entries(directory):
    return {path.name for path in Path(directory).iterdir() if path.is_dir()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=15))
def test_the_least_recently_used_go_first_and_what_is_in_use_stays(operations):
    with tempfile.TemporaryDirectory() as directory:
        used: list[str] = []  # by time of last use
        held: list[tuple[str, Cache]] = []
        for name, close_one in operations:
            if close_one and held:
                held.pop(0)[1].close()
            in_use = {other for other, _ in held}
            job, left = Cache(directory, BUDGET), list(used)
            if name not in used:
                for other in [other for other in used if other not in in_use]:
                    if sum(SIZES[n] for n in left) + SIZES[name] > BUDGET:
                        left.remove(other)
            fits = sum(SIZES[n] for n in {*left, name}) <= BUDGET
            try:
                obtain(job, name)
            except DataError:
                assert SIZES[name] > BUDGET
                assert name == "e"
            except RetryableError:
                assert not fits
            else:
                assert fits
                held.append((name, job))
                used = [other for other in left if other != name] + [name]
            assert entries(directory) == set(used)
            assert sum(SIZES[n] for n in used) <= BUDGET
        for _, job in held:
            job.close()


def test_a_damaged_entry_is_filled_again(tmp_path):
    with Cache(tmp_path) as first:
        (obtain(first, "a") / "data").unlink()
    with Cache(tmp_path) as second:
        assert (obtain(second, "a") / "data").stat().st_size == 10


def test_a_failed_fill_is_no_entry_and_its_error_is_seen(tmp_path):
    def fill(directory):
        (directory / "data").write_bytes(b"half")
        raise RetryableError("no connection")

    with Cache(tmp_path) as cache:
        with pytest.raises(RetryableError, match="no connection"):
            cache.obtain("a", 10, fill, is_sound)
        assert entries(tmp_path) == {"a.partial"}
        assert obtain(cache, "a") == tmp_path / "a"
        assert entries(tmp_path) == {"a"}


PROCESS = """
import sys, time
from pathlib import Path
from pipeline.data.cache import Cache
def fill(directory):
    with (directory / "log").open("a") as log: log.write("filled\\n")
    (directory / "data").write_bytes(b"0123456789")
    if sys.argv[2] == "stuck":
        time.sleep(600)
    time.sleep(0.5)
cache = Cache(sys.argv[1], 12)
print((cache.obtain("a", 10, fill, lambda d: True) / "log").read_text(), flush=True)
sys.stdin.read()
"""


def process(directory, how="well"):
    command = [sys.executable, "-c", PROCESS, str(directory), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_clock_that_was_set_back_does_not_change_the_order_of_uses(tmp_path, monkeypatch):
    for clock, name in ((None, "a"), (None, "b"), (0, "a"), (0, "d")):
        if clock is not None:
            monkeypatch.setattr(time, "time_ns", lambda: 0)
        cache = Cache(tmp_path, BUDGET)
        obtain(cache, name)
        cache.close()
    assert entries(tmp_path) == {"a", "d"}


def test_processes_at_once_fill_once_and_keep_it_from_eviction(tmp_path):
    processes = [process(tmp_path) for _ in range(3)]
    logs = [p.stdout.readline() for p in processes]
    assert logs == ["filled\n"] * 3
    with Cache(tmp_path, 12) as cache:
        with pytest.raises(RetryableError, match="no unused entry can be evicted"):
            obtain(cache, "b", 5)
        for p in processes:
            p.kill()
            p.communicate()
        obtain(cache, "b", 5)
    assert entries(tmp_path) == {"b"}


def test_killed_while_filling_nothing_looks_finished(tmp_path):
    killed = process(tmp_path, "stuck")
    while not (tmp_path / "a.partial" / "data").exists():
        assert killed.poll() is None, "the process ended by itself"
        time.sleep(0.02)
    waiting = process(tmp_path)
    with pytest.raises(CancelledError):
        obtain(Cache(tmp_path, cancelled=lambda: True), "a")  # the entry is locked, so it would wait
    assert entries(tmp_path) == {"a.partial"}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert waiting.stdout.readline() == "filled\n"
    assert waiting.stdout.readline() == "filled\n"  # it continued the partial entry
    assert entries(tmp_path) == {"a"}
    waiting.kill()
    for p in (killed, waiting):
        p.communicate()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("a small disk needs root and mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(small_disk):
    with Cache(small_disk) as cache:
        with pytest.raises(RetryableError, match=r"a needs 9000000 bytes, .* more than .*disk has left"):
            obtain(cache, "a", 9_000_000)
        with pytest.raises(RetryableError, match=r"the disk of .*disk is full: a needs 1000 bytes; free some, or set"):
            cache.obtain("a", 1000, lambda d: (d / "data").write_bytes(bytes(9_000_000)) and None, is_sound)
        assert entries(small_disk) == set()
        assert shutil.disk_usage(small_disk).used < 100_000
        obtain(cache, "a", 3_000_000)
    with Cache(small_disk) as other:
        obtain(other, "b", 3_000_000)  # without a budget the disk is the limit
    assert entries(small_disk) == {"b"}


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache cannot be used: Not a directory; set data.cache_dir"):
        obtain(Cache(tmp_path / "file" / "cache"), "a")


def test_the_directory_of_each_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    assert Cache("$SCRATCH/fcmae").directory == tmp_path / "fcmae"
