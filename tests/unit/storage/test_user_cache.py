"""Where what can be made again is kept, also without a home directory, and the locks of a machine."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.storage import user_cache as module
from pipeline.storage.machine_lock import is_locked, machine_lock
from pipeline.storage.user_cache import (
    CACHES_OF_LIBRARIES,
    can_write,
    keep_compiled_code_local,
    private_folder,
    redirect_caches,
    user_cache,
)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A directory of temporary files of this test's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    private_folder.cache_clear()
    yield folder
    private_folder.cache_clear()


@pytest.mark.parametrize(
    ("xdg", "home", "place"),
    [
        ("{0}/xdg", "{0}/home", "xdg/fcmae"),
        (None, "{0}/home", "home/.cache/fcmae"),
        (None, "/proc/nowhere", "temporary/fcmae-{1}"),
        ("/proc/nowhere", "{0}/home", "temporary/fcmae-{1}"),
    ],
)
def test_the_cache_is_the_first_folder_that_can_be_written(monkeypatch, tmp_path, xdg, home, place):
    for name, value in (("XDG_CACHE_HOME", xdg), ("HOME", home)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value.format(tmp_path))
    assert user_cache() == tmp_path / place.format(tmp_path, os.getuid())
    assert can_write(user_cache())


def test_the_private_folder_belongs_to_this_user_alone(temporary):
    assert private_folder().stat().st_mode & 0o777 == 0o700
    assert private_folder().parent == temporary


@pytest.mark.parametrize("planted", ["open to all", "a link", "a file"])
def test_a_folder_that_others_can_write_is_not_used(temporary, planted):
    place = temporary / f"fcmae-{os.getuid()}"
    if planted == "open to all":
        place.mkdir()
        place.chmod(0o777)
    elif planted == "a link":
        (temporary / "theirs").mkdir()
        place.symlink_to(temporary / "theirs")
    else:
        place.touch()
    assert private_folder() != place
    assert private_folder().stat().st_mode & 0o777 == 0o700


def test_caches_of_libraries_move_only_where_there_is_no_home(monkeypatch, tmp_path):
    for name in CACHES_OF_LIBRARIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    redirect_caches()
    assert not CACHES_OF_LIBRARIES.keys() & os.environ.keys()
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    for name in CACHES_OF_LIBRARIES.keys() - {"TRITON_CACHE_DIR"}:
        monkeypatch.setenv(name, "")  # so that the test's end removes what is set here
    redirect_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["MPLCONFIGDIR"] == str(module.private_folder() / "matplotlib")


@pytest.mark.parametrize("has_scratch", [True, False])
def test_compiled_code_is_kept_on_the_node_unless_the_user_says_where(monkeypatch, tmp_path, has_scratch):
    monkeypatch.setenv("FCMAE_SCRATCH", str(tmp_path / "scratch"))
    if has_scratch:
        (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_DEFAULT_FP_FUSION"):
        monkeypatch.setenv(name, "")  # so that the test's end removes what is set here
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    keep_compiled_code_local()
    folder = tmp_path / "scratch/fcmae" if has_scratch else private_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"


def test_a_lock_is_waited_for_and_ends_with_its_holder_however_that_ends(temporary):
    code = (
        "import signal\nfrom pipeline.storage.machine_lock import machine_lock\n"
        "with machine_lock('x'):\n    print('held', flush=True)\n    signal.pause()"
    )
    assert not is_locked("x")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_locked("x")
        waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with waiting:
        assert waiting.stdout.readline() == "held\n"
        waiting.kill()
    with machine_lock("x"):
        assert Path(private_folder() / "x.lock").exists()
