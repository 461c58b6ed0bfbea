"""Copy data files from any fsspec URL to this machine's disk, and compare every byte with the side-car.

A plain path is read where it lies. A URL (`s3://bucket/train.beton`, `file:///lustre/train.beton`) is copied once per
machine into a cache, under a name that holds its hash, so changed data gets another name.
"""

import hashlib
import os
import queue
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from pipeline.data.beton import Beton, open_beton, read_sidecar, sidecar_path
from pipeline.data.cache import Cache, CancelledError
from pipeline.errors import DataError, RetryableError, UserError
from pipeline.storage.user_cache import user_cache

CHUNK_BYTES = 8 << 20
CHUNKS_AT_ONCE = 8  # because one stream of an object store is far slower than the network
REPORT_SECONDS = 10.0


def is_url(location: str) -> bool:
    """Return whether a data path must be copied to this machine before it can be opened."""
    return "://" in location


def cache_directory(setting: str | None) -> str:
    """Return `data.cache_dir`, else a folder of $FCMAE_SCRATCH (a node's own disk) or of the user's cache directory."""
    scratch = os.environ.get("FCMAE_SCRATCH")
    return setting or (f"{scratch}/fcmae" if scratch else str(user_cache()))


def describe_beton(location: str, timeout_seconds: float) -> Beton:
    """Return the contents of a data file's side-car; of a URL nothing else is read.

    Raises:
        DataError, RetryableError: as `fetch_beton`.
    """
    if not is_url(location):
        return open_beton(location)
    with tempfile.TemporaryDirectory() as directory:
        return _Remote(location, timeout_seconds).sidecar(Path(directory))


def fetch_beton(location: str, cache: Cache, timeout_seconds: float) -> Beton:
    """Open and check a data file, after copying it to this machine's disk if it is a URL.

    The copy stays there until `cache` is closed. A copy that a killed process began is continued.

    Raises:
        DataError: if the file does not exist, cannot be reached for a lasting reason, or differs from its side-car.
        RetryableError: if the connection is lost, the server sends nothing for `timeout_seconds`, or the disk is full.
        CancelledError: if the cache's owner cancels.
    """
    if not is_url(location):
        return open_beton(location)
    remote = _Remote(location, timeout_seconds)
    with tempfile.TemporaryDirectory() as directory:
        beton = remote.sidecar(Path(directory))
    name = f"{beton.path.stem}-{beton.identity[:16]}"
    entry = cache.obtain(
        name, beton.total_bytes, partial(remote.copy, beton, cache.cancelled), partial(_is_sound, beton)
    )
    return open_beton(entry / beton.path.name)


def _is_sound(beton: Beton, directory: Path) -> bool:
    try:
        return open_beton(directory / beton.path.name).identity == beton.identity
    except DataError as error:
        print(f"{error}: it is copied again now", file=sys.stderr)
        return False


class _Remote:
    """A .beton file and its side-car behind a URL."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        DataError.refuse_secrets(url)
        self.url, self.timeout_seconds = url, timeout_seconds
        try:
            self._files, self._path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise DataError(f"data from {url} cannot be read: {_one_line(error)}") from None

    def sidecar(self, directory: Path) -> Beton:
        """Copy the side-car into `directory` and return its contents."""
        path = directory / self._path.rsplit("/", 1)[-1]
        content = self._answer(self._request(self._files.cat_file, f"{self._path}.json"), f"{self.url}.json")
        sidecar_path(path).write_bytes(content)
        try:
            return read_sidecar(path)
        except DataError as error:
            raise DataError(f"{self.url}: {error}") from None

    def copy(self, beton: Beton, cancelled: Callable[[], bool], directory: Path) -> None:
        """Copy the data file, its side files and its side-car into `directory`, continuing an interrupted copy."""
        self._copy(directory / beton.path.name, beton.size_bytes, beton.sha256, cancelled)
        for path, side in beton.side_files.items():
            self._copy(directory / path.name, side.bytes, side.sha256, cancelled)
        self.sidecar(directory)

    def _copy(self, path: Path, size_bytes: int, sha256: str, cancelled: Callable[[], bool]) -> None:
        continued = path.exists()
        if self._append(path, size_bytes, cancelled) != sha256:
            path.unlink()
            # The part that was there may be damaged, for example by a power cut, so try once from the beginning.
            if not continued or self._append(path, size_bytes, cancelled) != sha256:
                path.unlink(missing_ok=True)
                raise DataError(f"the bytes of {self._beside(path)} differ from its side-car; upload both again")

    def _beside(self, path: Path) -> str:
        """The URL of the file of this name."""
        return self.url + path.name.removeprefix(self._path.rsplit("/", 1)[-1])

    def _append(self, path: Path, size_bytes: int, cancelled: Callable[[], bool]) -> str:
        """Copy the missing part of the file of this name and return the hash of the whole."""
        url, remote = self._beside(path), self._path.rsplit("/", 1)[0] + "/" + path.name
        digest, reported = hashlib.sha256(), time.monotonic()
        with path.open("a+b") as file:
            file.truncate(min(file.tell(), size_bytes))
            file.seek(0)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if cancelled():
                    raise CancelledError
            done = file.tell()
            for chunk in self._chunks(remote, done, size_bytes):
                if cancelled():
                    raise CancelledError
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    print(f"{url}: copied {done / 1e9:.1f} of {size_bytes / 1e9:.1f} GB", file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _chunks(self, remote: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of a path there from `start` to `end` in order, with several requests under way at a time."""
        requests: deque[queue.Queue] = deque()
        url = self._beside(Path(remote))
        for place in range(start, end, CHUNK_BYTES):
            piece = {"start": place, "end": min(place + CHUNK_BYTES, end)}
            requests.append(self._request(self._files.cat_file, remote, **piece))
            if len(requests) == CHUNKS_AT_ONCE:
                yield self._answer(requests.popleft(), url)
        while requests:
            yield self._answer(requests.popleft(), url)

    def _request(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> queue.Queue:
        """Call in a daemon thread, because a server that never answers must not keep this process from ending."""
        box: queue.Queue = queue.Queue(1)

        def call() -> None:
            try:
                box.put(function(*arguments, **options))
            except BaseException as error:
                box.put(error)

        threading.Thread(target=call, daemon=True).start()
        return box

    def _answer(self, box: queue.Queue, url: str) -> Any:
        """Wait for the answer of a request for the file at `url`."""
        try:
            answer = box.get(timeout=self.timeout_seconds)
        except queue.Empty:
            raise RetryableError(
                f"{url}: the server has sent nothing for {self.timeout_seconds:g} s; try again later, or raise"
                " data.timeout_seconds"
            ) from None
        if isinstance(answer, BaseException):
            raise _explained(answer, url) from answer
        return answer


def _explained(error: BaseException, url: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{url} does not exist; correct the path, or upload the data file with all files beside it")
    if isinstance(error, (PermissionError, ImportError)) or "Credentials" in type(error).__name__:
        return DataError(f"{url} cannot be read: {_one_line(error)}; correct the credentials or the path")
    return RetryableError(f"the connection to {url} was lost ({_one_line(error)}); try again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
