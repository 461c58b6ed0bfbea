"""A copy of the code beside the run: a job that is requeued weeks later runs the code that was submitted."""

import compileall
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from cluster.slurm.verified_start import RECORD, hash_folder
from pipeline.stage.environment import ROOT, SNAPSHOT, describe_commit, describe_software

ROOMS = ("pipeline", "recipes", "cluster", "tools")
MODULE = "fcmae.py"  # the way in from Python, for scripts that run beside a job
CODE_FOLDER = "code"  # in the run directory
_KINDS = (".py", ".yaml", ".j2", ".md")  # of the program's own files, where git cannot say which are its own
_COMPILED = (".pyc", ".nbi", ".nbc")  # by Python and numba
# Names of files that hold secrets, wherever they are. Code is told by its suffix.
_SECRET_FILE = re.compile(
    r"\..*|.*\.(env|pem|key|p12|pfx|jks|keystore|kdbx|ppk|gpg|asc)|id_(rsa|dsa|ecdsa|ed25519).*"
    r"|.*(secret|credential|passw|token).*(?<!\.py)",
    re.IGNORECASE,
)


def code_snapshot_path(run: Path) -> Path:
    """The folder of this code with these package versions, named by its content so that equal code is kept once."""
    digest = hashlib.sha256(json.dumps([RECORD, describe_software()]).encode())
    for path in source_files(ROOT):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return run / CODE_FOLDER / digest.hexdigest()[:12]


def take_code_snapshot(run: Path) -> Path:
    """Copy the code and record the versions and the copy's hash, unless a whole copy exists already; the folder for
    PYTHONPATH. A copy that was changed is set aside."""
    folder = code_snapshot_path(run)
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(mkdtemp(prefix=".new-", dir=folder.parent))
        try:
            _copy_code(new)
            if folder.exists() and not _is_whole(folder):
                folder.rename(mkdtemp(prefix=".changed-", dir=folder.parent))
            try:
                new.rename(folder)
            except OSError:
                if not folder.exists():  # no other process has made the same snapshot meanwhile
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)  # where it was not renamed, as on a full disk
    return folder


def _copy_code(new: Path) -> None:
    """Copy the code into an empty folder, with its versions and its hash."""
    new.chmod(0o755)
    sources = source_files(ROOT)
    # numba keeps compiled code beside the sources and knows it by their dates. Without a copy of it every rank of every
    # new run would compile for 20 s first.
    for path in (*sources, *_compiled_files(sources)):
        copy = new / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # compiled code that another process replaces now
            shutil.copy2(path, copy)
    if not sys.dont_write_bytecode:  # the jobs may not, see `JobScript`
        compileall.compile_dir(new, quiet=2)
    (new / SNAPSHOT).write_text(json.dumps({**describe_software(), "commit": describe_commit()}, indent=2) + "\n")
    (new / RECORD).write_text(hash_folder(str(new)) + "\n")


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / RECORD).read_text().strip() == hash_folder(str(folder))
    except OSError:
        return False


def source_files(root: Path) -> list[Path]:
    """The program's files below `root`, without what .gitignore leaves out and without files that hold secrets."""
    in_checkout = (root / ".git").exists()
    listed = _listed_by_git(root, in_checkout)
    paths = listed or [root / MODULE, *(path for room in ROOMS for path in (root / room).rglob("*"))]
    return sorted(
        path
        for path in dict.fromkeys(paths)
        if path.is_file()
        and path.resolve().is_relative_to(root.resolve())
        and "__pycache__" not in path.parts
        and not any(_SECRET_FILE.fullmatch(part) for part in path.relative_to(root).parts)
        and (path.suffix in _KINDS or (listed and in_checkout))
    )


def _listed_by_git(root: Path, in_checkout: bool) -> list[Path]:
    """The tracked files and the new ones that are not ignored, by the .gitignore files of all folders. Outside of a
    checkout an empty repository applies the same rules. Empty if git is not installed or fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        own = [] if in_checkout else ["-c", f"core.excludesFile={os.devnull}"]  # `data/` in it would leave out our own
        command = ["git", "-c", "safe.directory=*", *own, "-C", str(root), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=60, encoding="utf-8",
            errors="surrogateescape",
        ).stdout  # fmt: skip

    listing = ("ls-files", "-z", "--others", "--exclude-standard")
    try:
        if in_checkout:
            names = git(*listing, "--cached", "--", MODULE, *ROOMS)
        else:
            with TemporaryDirectory() as empty:
                git("init", "-q", empty)
                names = git(f"--git-dir={empty}/.git", f"--work-tree={root}", *listing, "--", MODULE, *ROOMS)
    except (OSError, subprocess.SubprocessError):
        return []
    return [root / name for name in names.split("\0") if name]


def _compiled_files(sources: Iterable[Path]) -> list[Path]:
    """The compiled code of the sources, such as __pycache__/decode.cpython-311.pyc."""
    known = set(sources)
    folders = {path.parent / "__pycache__" for path in known if path.suffix == ".py"}
    files = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    return sorted(
        path
        for path in files
        if path.suffix in _COMPILED and path.parents[1] / f"{path.name.partition('.')[0]}.py" in known
    )
