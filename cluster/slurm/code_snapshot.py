"""The code of a run, kept beside it: a job that is requeued weeks later runs what was submitted."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import pipeline
from pipeline.stage.environment import SNAPSHOT, commit, software

ROOMS = ("pipeline", "recipes", "cluster", "tools")


def code_snapshot_path(run: Path) -> Path:
    """Where this code with these versions goes: named by content, so that what did not change is kept once."""
    digest = hashlib.sha256(json.dumps(software()).encode())
    for path in _files():
        digest.update(f"{path.relative_to(_root())}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return run / "code" / digest.hexdigest()[:12]


def take_code_snapshot(run: Path) -> Path:
    """Copy the code and note the versions, unless they are there already; the folder for PYTHONPATH."""
    folder = code_snapshot_path(run)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=".new-", dir=folder.parent))
        aside.chmod(0o755)
        for path in _files():
            copy = aside / path.relative_to(_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        # What numba has compiled is kept beside the sources and known by their dates: without it every rank of every
        # new run would compile for 20 s first.
        for cache in (path for room in ROOMS for path in (_root() / room).rglob("__pycache__")):
            with suppress(shutil.Error):  # another process writes there just now, or the files are not ours to read
                shutil.copytree(cache, aside / cache.relative_to(_root()), dirs_exist_ok=True)
        (aside / SNAPSHOT).write_text(json.dumps({**software(), "commit": commit(_root())}, indent=2) + "\n")
        try:
            aside.rename(folder)
        except OSError:  # somebody else was quicker
            shutil.rmtree(aside)
    return folder


def _root() -> Path:
    return Path(pipeline.__file__).parents[1]


def _files() -> list[Path]:
    found = (path for room in ROOMS for path in (_root() / room).rglob("*"))
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)
