"""A directory of fetched data that the processes of a machine share: filled once, kept within a byte budget.

    NAME/           an entry, complete: only a finished fill gets this name
    NAME.partial/   being filled, or left by a process that was killed; the next one continues it
    NAME.lock       exclusively locked while the entry is filled or removed, shared by every process that uses it;
                    holds the entry's bytes, reserved before the filling; its time is that of the last use

Locks are the kernel's (flock): they end with the process that holds them, however it ends.
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
    """The caller no longer wants what it waits for."""


class Cache:
    """Entries of a directory; those obtained stay on the disk until `close` or the end of this process.

    directory: on a local disk; `~` and `$VARIABLES` are those of the machine that opens it.
    budget_bytes: the most that all entries may take; None leaves it to the disk.
    cancelled: asked several times a second while waiting; CancelledError is raised once it says yes.
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
        """Lets go of the entries, so that they may be evicted."""
        while self._held:
            self._held.popitem()[1].close()

    def obtain(
        self, name: str, size_bytes: int, fill: Callable[[Path], None], is_sound: Callable[[Path], bool]
    ) -> Path:
        """The directory of an entry. One process fills it, the others wait.

        fill: writes the entry's files into a directory, which may hold what an earlier, killed one wrote.
        is_sound: whether a complete entry can still be used; else it is removed and filled again.
        Errors: whatever `fill` raises; DataError for an entry that can never fit or a directory that cannot be written;
        RetryableError when the disk or the budget is full of what is in use.
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
        except OSError:  # a full disk is given back
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
            os.utime(lock.fileno(), ns=(time.time_ns(),) * 2)
            self._held[name] = os.fdopen(os.dup(lock.fileno()), "rb")  # the lock lives as long as one of the two
        return True

    def _reserve(self, name: str, size_bytes: int, lock: BinaryIO) -> None:
        """Evict the least recently used entries that nobody uses until this one fits; none if it cannot."""
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
                        " left, and nothing unused is there to evict; try again later, raise data.cache_bytes, or set"
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
        """What an entry takes of the disk, complete or not."""
        found = [*self.directory.glob(f"{name}/*"), *self.directory.glob(f"{name}.partial/*")]
        return sum(path.stat().st_blocks * 512 for path in found)

    def _size(self, name: str) -> int:
        return int((self.directory / f"{name}.lock").read_bytes() or 0)

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
        began, said = time.monotonic(), False
        while (file := self._try_lock(name, mode)) is None:
            if self.cancelled():
                raise CancelledError
            if not said and time.monotonic() - began > 5:
                said = True
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
