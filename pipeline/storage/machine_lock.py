"""Locks that the processes of a user share on one machine. They are the kernel's, so they end with their holder."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.storage.user_cache import private_folder

COMPILING = "image-decoder"  # held while a process compiles the image decoder
COMPILING_SENTENCE = "compiling the image decoder, once for this machine"
COMPILING_BLOCKS = "blocks"  # held while a process compiles the blocks of a model
COMPILATIONS = {
    COMPILING: COMPILING_SENTENCE,
    COMPILING_BLOCKS: "compiling the blocks of the model, once for this machine",
}
POLL_SECONDS = 0.1


@contextmanager
def machine_lock(name: str) -> Iterator[None]:
    """Hold a lock while the block runs. Waits for another holder without a time-out, as long as that one lives."""
    with open(_file(name), "ab") as lock:
        while not _try_lock(lock.fileno(), fcntl.LOCK_EX):
            time.sleep(POLL_SECONDS)
        yield


def is_locked(name: str) -> bool:
    """Return whether a process of this user holds the lock on this machine now."""
    try:
        with open(_file(name), "rb") as lock:
            return not _try_lock(lock.fileno(), fcntl.LOCK_SH)
    except OSError:
        return False


def _file(name: str) -> Path:
    return private_folder() / f"{name}.lock"


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
