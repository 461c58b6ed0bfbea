"""A run directory on an object store is worked on in a local copy.

Objects cannot be appended to, so the journal and all that changes is written locally and uploaded whole: every few
seconds, before each checkpoint is committed, and at the end. What must never be believed too early or too late is not
mirrored but written to the store itself: the attempts and the checkpoints.
"""

import hashlib
import os
import tempfile
from pathlib import Path, PurePosixPath

from pipeline.errors import StageError
from pipeline.storage.file_names import ATTEMPTS_FOLDER, CHECKPOINTS_FOLDER, DONE_FILE, RECIPE_FILE
from pipeline.storage.folder import Folder, is_remote, is_storage_error

MARKER = "REMOTE"
NOT_MIRRORED = {ATTEMPTS_FOLDER, CHECKPOINTS_FOLDER, MARKER}


def working_copy(run: str | os.PathLike) -> Path:
    """The local directory to work in for a run: itself, or the fresh copy of a URL.

    Copies lie in $FCMAE_MIRROR, by default ~/.cache/fcmae: all ranks of the run must see it by this path.

    Raises:
        StageError: if the store cannot be read.
    """
    if not is_remote(run):
        return Path(run)
    url = os.fspath(run).rstrip("/")
    home = Path(os.environ.get("FCMAE_MIRROR") or Path.home() / ".cache" / "fcmae")
    directory = home / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    directory.parent.mkdir(parents=True, exist_ok=True)
    (directory.parent / MARKER).write_text(url)
    try:
        pull(Folder.at(url), directory)
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise _unreadable(url, error) from error
    return directory


def _unreadable(url: str, error: Exception) -> StageError:
    return StageError(f"{url} cannot be read ({type(error).__name__}: {error}); repair the storage")


def remote_of(directory: Path) -> Folder | None:
    """The store's folder of a working copy, or of a stage in one; None for a directory that is no copy."""
    directory = directory.absolute()
    for run in (directory, directory.parent):
        marker = run.parent / MARKER
        if marker.is_file():
            folder = Folder.at(marker.read_text())
            return folder if run == directory else folder / directory.name
    return None


def pull(remote: Folder, directory: Path) -> None:
    """Download what is there. A local file that goes on where the store's ends stays: its tail was not uploaded yet."""
    remote.fs.invalidate_cache(remote.path)
    for path in remote.fs.find(remote.path):
        name = path[len(remote.path) :].lstrip("/")
        if not NOT_MIRRORED.intersection(name.split("/")):
            content, goal = remote.read(name), directory / name
            if not (goal.is_file() and goal.read_bytes().startswith(content)):
                Folder.at(goal.parent).publish(goal.name, content)


class View:
    """A copy of the small files that tell how a remote run or stage stands, to look at while others write there.

    It lies in a temporary folder that goes with this object. No tensors are fetched: of a checkpoint only whether it is
    committed. Files have the time at which the store got them.

    Raises:
        StageError: if the store cannot be read, or there is no run or stage at the URL.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._remote, self._versions = Folder.at(self.url), dict[str, tuple[object, ...]]()
        self._temporary = tempfile.TemporaryDirectory(prefix="fcmae-view-")
        self.directory = Path(self._temporary.name) / (self.url.rpartition("/")[2] or "run")
        (self.directory.parent / MARKER).write_text(self.url)
        self.refresh()
        if not (self.directory / RECIPE_FILE).is_file():
            raise StageError(f"{url} is no run directory: it has no recipe.yaml; give the --out of `fcmae run`")

    def refresh(self) -> None:
        """Fetch what has changed."""
        fs, root = self._remote.fs, self._remote.path
        try:
            fs.invalidate_cache(root)
            for path, about in fs.find(root, detail=True).items():
                name = path[len(root) :].lstrip("/")
                version = tuple(about.get(key) for key in ("size", "ETag", "LastModified", "mtime", "created"))
                if _tells(PurePosixPath(name)) and self._versions.get(name) != version:
                    self._fetch(name, path)
                    self._versions[name] = version
        except Exception as error:
            if not is_storage_error(error):
                raise
            raise _unreadable(self.url, error) from error

    def _fetch(self, name: str, path: str) -> None:
        goal, fs = self.directory / name, self._remote.fs
        try:
            content, written = fs.cat_file(path), fs.modified(path).timestamp()
        except FileNotFoundError:  # pruned in the meantime
            return
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_bytes(content)
        os.utime(goal, (written, written))


def _tells(name: PurePosixPath) -> bool:
    if CHECKPOINTS_FOLDER in name.parts:
        return name.name == "COMMIT"
    return name.name in (RECIPE_FILE, DONE_FILE) or name.suffix in (".json", ".jsonl", ".heartbeat")


class Uploads:
    """Sends the files of a working copy that match `pattern` to its store, each when it has changed. DONE goes last."""

    def __init__(self, directory: Path, remote: Folder, pattern: str = "**/*"):
        self._directory, self._remote, self._pattern = directory, remote, pattern
        self._sent: dict[str, tuple[int, int]] = {}

    def push(self) -> None:
        """Raises the storage's errors; what was not sent is sent next time."""
        files = [path for path in self._directory.glob(self._pattern) if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == DONE_FILE, path)):
            name = str(path.relative_to(self._directory))
            if NOT_MIRRORED.intersection(name.split("/")) or name.endswith(".tmp"):
                continue
            try:
                about = path.stat()
                version = (about.st_mtime_ns, about.st_size)
                if self._sent.get(name) == version:
                    continue
                content = path.read_bytes()
            except FileNotFoundError:  # the watchdog takes its own files away when all is well
                continue
            self._remote.publish(name, content)
            self._sent[name] = version
