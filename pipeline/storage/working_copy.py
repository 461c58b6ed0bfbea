"""Keep local copies of a run directory that lives on an object store.

Objects cannot be appended to, so a run on a store is written in a local working copy, and files that have changed are
uploaded whole: every few seconds, before each checkpoint is committed, and at the end. Attempts, checkpoints and
profiles are written to the store itself, because another machine must see them at once.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.errors import StageError
from pipeline.storage.file_names import ATTEMPTS_FOLDER, CHECKPOINTS_FOLDER, DONE_FILE, PROFILES_FOLDER, RECIPE_FILE
from pipeline.storage.folder import Folder, is_remote, is_storage_error
from pipeline.storage.user_cache import user_cache

MARKER = "REMOTE"  # a file beside the run's copy that holds the run's URL


def is_mirrored(path: PurePosixPath) -> bool:
    """Whether a file of a run is copied between the store and the working copy."""
    apart = {ATTEMPTS_FOLDER, CHECKPOINTS_FOLDER, PROFILES_FOLDER, MARKER}
    return not apart.intersection(path.parts) and path.suffix != ".tmp"


def is_mirrored_run_file(path: PurePosixPath) -> bool:
    """Whether a file is copied and belongs to the run, not to one of its stages."""
    return len(path.parts) == 1 and is_mirrored(path)


def shows_progress(path: PurePosixPath) -> bool:
    """Whether a file is small and tells how far a run is; of a checkpoint only COMMIT."""
    if CHECKPOINTS_FOLDER in path.parts:
        return path.name == "COMMIT"
    return path.name in (RECIPE_FILE, DONE_FILE) or path.suffix in (".json", ".jsonl", ".heartbeat")


class Mirror:
    """Copies files between a local directory and a folder on an object store, each only when it has changed.

    Args:
        includes: tells from a relative path whether the file is copied.
    """

    def __init__(self, directory: Path, remote: Folder, includes: Callable[[PurePosixPath], bool] = is_mirrored):
        self._directory, self._remote, self._includes = directory, remote, includes
        self._pulled: dict[str, tuple[object, ...]] = {}  # version of each file on the store
        self._pushed: dict[str, tuple[int, int]] = {}  # time and size of each local file
        self._pushing = threading.Lock()

    def pull(self) -> list[str]:
        """Download what has changed on the store; returns the relative paths. Raises the storage's errors.

        A local file that starts with the store's content is left alone: its end was not uploaded yet.
        """
        fs, root, changed = self._remote.fs, self._remote.path, []
        fs.invalidate_cache(root)
        for path, about in fs.find(root, detail=True).items():
            name = path[len(root) :].lstrip("/")
            version = tuple(about.get(key) for key in ("size", "ETag", "LastModified", "mtime", "created"))
            if not self._includes(PurePosixPath(name)) or self._pulled.get(name) == version:
                continue
            try:
                content = self._remote.read(name)
            except FileNotFoundError:  # deleted since it was listed
                continue
            local = self._directory / name
            if not (local.is_file() and local.read_bytes().startswith(content)):
                Folder.at(local.parent).publish(local.name, content)
            self._pulled[name] = version
            changed.append(name)
        return changed

    def push(self) -> None:
        """Upload what has changed locally, DONE last. Raises the storage's errors; the next call sends the rest."""
        with self._pushing:
            files = [path for path in self._directory.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.name == DONE_FILE, path)):
                relative = PurePosixPath(path.relative_to(self._directory))
                if not self._includes(relative):
                    continue
                name = str(relative)
                try:
                    about = path.stat()
                    version = (about.st_mtime_ns, about.st_size)
                    if self._pushed.get(name) == version:
                        continue
                    content = path.read_bytes()
                except FileNotFoundError:  # the watchdog deletes its files when all is well
                    continue
                self._remote.publish(name, content)
                self._pushed[name] = version


def working_copy(run: str | os.PathLike) -> Path:
    """The local directory to work in: `run` itself if it is a path, an updated copy if it is a URL.

    Copies lie in $FCMAE_MIRROR, by default in the user's cache, under the same path for all ranks.

    Raises:
        StageError: if the store cannot be read, or the URL holds a password.
    """
    if not is_remote(run):
        return Path(run)
    StageError.refuse_secrets(os.fspath(run))
    url = os.fspath(run).rstrip("/")
    home = Path(os.environ.get("FCMAE_MIRROR") or user_cache())
    directory = home / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    directory.parent.mkdir(parents=True, exist_ok=True)
    (directory.parent / MARKER).write_text(url)
    with _readable(url):
        Mirror(directory, Folder.at(url)).pull()
    return directory


def remote_of(directory: Path) -> Folder | None:
    """The folder on a store that a run's copy, or a stage in it, is a copy of; None for any other directory."""
    directory = directory.absolute()
    for run in (directory, directory.parent):
        marker = run.parent / MARKER
        if marker.is_file():
            folder = Folder.at(marker.read_text())
            return folder if run == directory else folder / directory.name
    return None


class RunView:
    """A temporary copy of the files that show the progress of a run or stage on a store, while others write there.

    Its files have the times at which the store received them. It is deleted with this object.

    Raises:
        StageError: if the store cannot be read, or there is no run or stage at the URL.
    """

    def __init__(self, url: str):
        StageError.refuse_secrets(url)
        self.url = url.rstrip("/")
        self._temporary = tempfile.TemporaryDirectory(prefix="fcmae-view-")
        self.directory = Path(self._temporary.name) / (self.url.rpartition("/")[2] or "run")
        (self.directory.parent / MARKER).write_text(self.url)
        self._remote = Folder.at(self.url)
        self._mirror = Mirror(self.directory, self._remote, shows_progress)
        self.refresh()
        if not (self.directory / RECIPE_FILE).is_file():
            raise StageError(f"{url} is no run directory: it has no recipe.yaml; give the --out of `fcmae run`")

    def refresh(self) -> None:
        """Download what has changed."""
        with _readable(self.url):
            for name in self._mirror.pull():
                try:
                    written = self._remote.fs.modified((self._remote / name).path).timestamp()
                except FileNotFoundError:  # deleted since it was read
                    continue
                os.utime(self.directory / name, (written, written))


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise StageError(f"{url} cannot be read ({type(error).__name__}: {error}); repair the storage") from error
