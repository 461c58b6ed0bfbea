"""A directory of fetched data that the processes of a machine share: filled once, kept within a byte budget.

    NAME/           a complete entry; it gets this name when the filling is finished
    NAME.partial/   an entry being filled, or left by a killed process; the next process continues it
    NAME.lock       locked exclusively while the entry is filled or removed, shared by every process that uses it;
                    its content is the entry's size in bytes, reserved before the filling; its time is the last use

Locks are the kernel's (flock), so they end with the process that holds them, however it ends.
"""

import errno
import fcntl
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

from pipeline.errors import DataError, RetryableError

POLL_SECONDS = 0.1


class CancelledError(Exception):
    """The owner of the cache has cancelled the wait."""


class Cache:
    """A cache directory. Entries that were obtained stay on the disk until `close` or the end of this process.

    Args:
        directory: on a local disk; `~` and `$VARIABLES` are expanded on the machine that opens it.
        budget_bytes: the most that all entries may take; None is limited by the disk alone.
        cancelled: called several times a second while waiting; CancelledError is raised once it returns True.
    """

    def __init__(
        self, directory: str | Path, budget_bytes: int | None = None, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        self.directory = Path(os.path.expandvars(directory)).expanduser().absolute()
        self.budget_bytes, self.cancelled = budget_bytes, cancelled
        self._held: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the entries, so that they may be evicted."""
        while self._held:
            self._held.popitem()[1].close()

    def obtain(
        self, name: str, size_bytes: int, fill: Callable[[Path], None], is_sound: Callable[[Path], bool]
    ) -> Path:
        """Return the directory of an entry. One process fills the entry while the others wait.

        Args:
            fill: writes the entry's files into a directory, which may hold files of an earlier, killed `fill`.
            is_sound: whether a complete entry can still be used; if not, it is removed and filled again.

        Raises:
            DataError: if the entry can never fit, or if the directory cannot be written.
            RetryableError: if the disk or the budget is full of entries in use. Errors of `fill` are raised too.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            while not self._use(name, is_sound):
                with self._locked(name, fcntl.LOCK_EX) as lock:
                    self._fill(name, size_bytes, fill, is_sound, lock)
        except OSError as error:
            raise self._explained(error, name, size_bytes) from None
        return self.directory / name

    def _fill(self, name: str, size_bytes: int, fill: Callable, is_sound: Callable, lock: BinaryIO) -> None:
        final, partial = self.directory / name, self.directory / f"{name}.partial"
        if final.exists():
            if is_sound(final):
                return  # another process was faster
            shutil.rmtree(final)
        self._reserve(name, size_bytes, lock)
        partial.mkdir(exist_ok=True)
        try:
            fill(partial)
        except OSError:  # perhaps the disk is full, so free what this entry took
            shutil.rmtree(partial, ignore_errors=True)
            lock.truncate(0)
            raise
        partial.rename(final)

    def _use(self, name: str, is_sound: Callable[[Path], bool]) -> bool:
        if name in self._held:
            return True
        with self._locked(name, fcntl.LOCK_SH) as lock:
            if not (self.directory / name).exists() or not is_sound(self.directory / name):
                return False
            # Later than every use before, even if the clock was set back.
            latest = max(path.stat().st_mtime_ns for path in self.directory.glob("*.lock"))
            os.utime(lock.fileno(), ns=(max(time.time_ns(), latest + 1),) * 2)
            self._held[name] = os.fdopen(os.dup(lock.fileno()), "rb")  # keeps the lock after `lock` is closed
        return True

    def _reserve(self, name: str, size_bytes: int, lock: BinaryIO) -> None:
        """Evict unused entries, the least recently used first, until this one fits; none if it cannot fit."""
        if self.budget_bytes is not None and size_bytes > self.budget_bytes:
            raise DataError(f"{name} has {size_bytes} bytes but data.cache_bytes is {self.budget_bytes}; raise it")
        with self._locked("eviction", fcntl.LOCK_EX):
            others = {p.stem: p.stat().st_mtime_ns for p in self.directory.glob("*.lock") if p.stem != "eviction"}
            others.pop(name, None)
            sizes = {other: self._size(other) for other in others}
            on_disk = size_bytes - self._bytes_of(name) - shutil.disk_usage(self.directory).free
            in_budget = sum(sizes.values()) + size_bytes - (self.budget_bytes or math.inf)
            evicted: dict[str, BinaryIO] = {}
            try:
                for other in sorted(others, key=lambda other: others[other]):
                    if on_disk <= 0 and in_budget <= 0:
                        break
                    if sizes[other] and (unused := self._try_lock(other)):
                        evicted[other] = unused
                        on_disk, in_budget = on_disk - self._bytes_of(other), in_budget - sizes[other]
                if on_disk > 0 or in_budget > 0:
                    raise RetryableError(
                        f"{name} needs {size_bytes} bytes, {max(on_disk, in_budget)} more than {self.directory} has"
                        " left, and no unused entry can be evicted; try again later, raise data.cache_bytes, or set"
                        " data.cache_dir or FCMAE_SCRATCH to a larger disk"
                    )
                for other, file in evicted.items():
                    for path in (self.directory / other, self.directory / f"{other}.partial"):
                        shutil.rmtree(path, ignore_errors=True)
                    file.truncate(0)
            finally:
                for file in evicted.values():
                    file.close()
            lock.truncate(0)
            os.pwrite(lock.fileno(), str(size_bytes).encode(), 0)

    def _bytes_of(self, name: str) -> int:
        """Return the disk space of an entry, complete or not."""
        files = [*self.directory.glob(f"{name}/*"), *self.directory.glob(f"{name}.partial/*")]
        return sum(path.stat().st_blocks * 512 for path in files)

    def _size(self, name: str) -> int:
        size = (self.directory / f"{name}.lock").read_bytes()[:20]
        return int(size) if size.isdigit() else 0

    def _try_lock(self, name: str, mode: int = fcntl.LOCK_EX) -> BinaryIO | None:
        file = os.fdopen(os.open(self.directory / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    @contextmanager
    def _locked(self, name: str, mode: int) -> Iterator[BinaryIO]:
        began, reported = time.monotonic(), False
        while (file := self._try_lock(name, mode)) is None:
            if self.cancelled():
                raise CancelledError
            if not reported and time.monotonic() - began > 5:
                reported = True
                print(f"waiting for another process that fills or uses {self.directory / name}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
        with file:
            yield file

    def _explained(self, error: OSError, name: str, size_bytes: int) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RetryableError(
                f"the disk of {self.directory} is full: {name} needs {size_bytes} bytes; free some, or set"
                " data.cache_dir or FCMAE_SCRATCH to a larger one"
            )
        return DataError(f"{self.directory} cannot be used: {error.strerror}; set data.cache_dir or FCMAE_SCRATCH")
