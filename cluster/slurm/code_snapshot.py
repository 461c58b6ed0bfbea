"""A copy of the code beside the run: a job that is requeued weeks later runs the code that was submitted."""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from pipeline.stage.environment import ROOT, SNAPSHOT, describe_commit, describe_software

ROOMS = ("pipeline", "recipes", "cluster", "tools")
MODULE = "fcmae.py"  # the way in from Python, for scripts that run beside a job
CODE_FOLDER = "code"  # in the run directory


def code_snapshot_path(run: Path) -> Path:
    """The folder of this code with these package versions, named by its content so that equal code is kept once."""
    digest = hashlib.sha256(json.dumps(describe_software()).encode())
    for path in _source_files():
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return run / CODE_FOLDER / digest.hexdigest()[:12]


def take_code_snapshot(run: Path) -> Path:
    """Copy the code and record the versions, unless the copy exists already; the folder for PYTHONPATH."""
    folder = code_snapshot_path(run)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(mkdtemp(prefix=".new-", dir=folder.parent))
        new.chmod(0o755)
        for path in _source_files():
            copy = new / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        # numba keeps compiled code beside the sources and knows it by their dates. Without a copy of it every rank of
        # every new run would compile for 20 s first.
        for cache in (path for room in ROOMS for path in (ROOT / room).rglob("__pycache__")):
            with suppress(shutil.Error):  # another process writes there now, or a file may not be read
                shutil.copytree(cache, new / cache.relative_to(ROOT), dirs_exist_ok=True)
        (new / SNAPSHOT).write_text(json.dumps({**describe_software(), "commit": describe_commit()}, indent=2) + "\n")
        try:
            new.rename(folder)
        except OSError:  # another process has made the same snapshot meanwhile
            shutil.rmtree(new)
    return folder


def _source_files() -> list[Path]:
    paths = (ROOT / MODULE, *(path for room in ROOMS for path in (ROOT / room).rglob("*")))
    return sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts)
