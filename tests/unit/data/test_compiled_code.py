"""The decoder is compiled once, before any time-out, and its code is found again, also where nothing can be written."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cluster.slurm.code_snapshot import take_code_snapshot
from pipeline.data import compiled_code, decode, image_checksum
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.decode import compile_decoder
from pipeline.data.feed import EvaluationFeed, TrainFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe.sections import BatchSettings, DataSettings
from pipeline.storage import announcement
from pipeline.storage.machine_lock import COMPILING, COMPILING_SENTENCE, is_locked
from tests.support import tiny_image
from tools.predict import evaluation_transform

no_mounts = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode
COMPILED = (decode._decode_some, image_checksum.mark_changed)


def test_nothing_is_left_to_compile_for_training_and_evaluation(tmp_path):
    compile_decoder()
    known = [len(function.overloads) for function in COMPILED]
    assert all(known)
    with BetonWriter(tmp_path / "a.beton", ("one",), 8) as writer:
        for number in range(8):
            writer.add(tiny_image(number)[0], 0)
    data = Subset(open_beton(tmp_path / "a.beton"))
    settings = DataSettings(train="a.beton", image_size=16, rand_augment="rand-m9-mstd0.5-inc1", on_damaged="skip")
    feed = TrainFeed(data, settings, BatchSettings(global_batch=4, slot=2), World.alone(), seed=0, workers=2)
    for step in range(2):
        list(feed.slots(step))
    feed.close()
    list(EvaluationFeed(data, settings, 3, World.alone(), workers=2))
    assert [len(function.overloads) for function in COMPILED] == known


def test_one_process_compiles_and_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(announcement, "ANNOUNCE_SECONDS", 0.05)
    monkeypatch.setattr(announcement, "_printed", set())
    with compiled_code.compiling(tmp_path):
        assert is_locked(COMPILING)
        said, deadline = "", time.monotonic() + 300
        while COMPILING_SENTENCE not in said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            said += capfd.readouterr().err
    capfd.readouterr()
    with compiled_code.compiling(tmp_path):  # it is known now
        assert not is_locked(COMPILING)
        time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_parts_that_one_process_compiles_are_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(announcement, "ANNOUNCE_SECONDS", 0.01)
    monkeypatch.setattr(announcement, "_printed", set())
    for part in ("decoder", "objects", "regions"):
        with compiled_code.compiling(tmp_path, part):
            time.sleep(0.1)
    assert capfd.readouterr().err == f"{COMPILING_SENTENCE}\n"


def test_predicting_runs_the_code_that_training_compiled(monkeypatch):
    """numba compiles a function for writable and for read-only arrays separately, and the decoder's are read-only."""
    writable = []
    monkeypatch.setattr(
        evaluation_transform, "_compiled_resize", lambda: lambda rgb, *rest: writable.append(rgb.flags.writeable)
    )
    evaluation_transform.whole_resized(np.zeros((5, 7, 3), np.uint8), (4, 4))
    assert writable == [False]


def test_what_fails_to_compile_is_not_noted_as_compiled(tmp_path):
    for _ in range(2):
        with suppress(ZeroDivisionError), compiled_code.compiling(tmp_path):
            assert is_locked(COMPILING)
            _ = 1 / 0


@pytest.mark.skipif(no_mounts, reason="this kernel lets users make no mount namespaces")
@pytest.mark.parametrize("home", [True, False])
def test_read_only_code_runs_and_brings_its_compiled_code(tmp_path, home):
    compile_decoder()
    code = take_code_snapshot(tmp_path)
    for place in ("home", "temporary"):
        (tmp_path / place).mkdir()
    program = (
        "from pipeline.data import decode; decode.compile_decoder(); s = decode._decode_some.stats;"
        "print(s.cache_path, sum(s.cache_hits.values()), sum(s.cache_misses.values()))"
    )
    mount = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/x" 2>/dev/null && shift && exec "$@"'
    )
    environment = {
        **os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "TMPDIR": str(tmp_path / "temporary"),
        "HOME": str(tmp_path / "home") if home else "/proc/nowhere",
    }  # fmt: skip
    environment.pop("XDG_CACHE_HOME", None)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", code]
    ran = subprocess.run(
        [*command, sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    place, hits, misses = ran.stdout.split()
    assert (hits, misses) == ("1", "0")
    expected = tmp_path / "home/.cache/fcmae" if home else tmp_path / "temporary" / f"fcmae-{os.getuid()}"
    assert Path(place).is_relative_to(expected)
