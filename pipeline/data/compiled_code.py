"""Compile functions with numba once: the code is kept on disk, and one process compiles while the others wait.

Compiling the decoder takes 15 seconds of a quiet core, minutes on a busy machine. It must never be taken for a slow
disk or a lost node, so it happens before any time-out runs.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba

from pipeline.stage.environment import ROOT, SNAPSHOT
from pipeline.storage.announcement import announced
from pipeline.storage.machine_lock import COMPILING, COMPILING_SENTENCE, machine_lock
from pipeline.storage.user_cache import can_write, user_cache

_SOURCES = Path(__file__).parent
_BESIDE = _SOURCES / "__pycache__"


def _choose_folder() -> None:
    """Have numba keep the code in the user's cache if the folder beside the sources cannot be written, or belongs to a
    code snapshot, whose hash must stay.

    That one comes first, as a copy of the code then brings the compiled code along.
    """
    is_snapshot = not numba.config.CACHE_DIR and (ROOT / SNAPSHOT).is_file()
    if is_snapshot or not can_write(Path(numba.config.CACHE_DIR or _BESIDE)):
        numba.config.CACHE_DIR = str(user_cache() / "numba")


_choose_folder()


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """Decorate a function for numba: compiled at its first call, kept on disk, run without the GIL."""
    return numba.njit(cache=True, nogil=True, **options)


@contextmanager
def compiling(folder: Path, part: str = "decoder", sources: Path = _SOURCES) -> Iterator[None]:
    """Run the block in one process of this machine at a time, unless the code was compiled before.

    The others wait without a time-out, for the kernel gives the lock back however its holder ends. After two seconds
    a sentence on stderr says what takes so long.

    Args:
        folder: where numba keeps the compiled code. Code from beside the sources, as in a container, is copied there.
        part: the name of what the block compiles, which is remembered as compiled afterwards.
        sources: the folder of its source files.
    """
    stamp = folder / f"{part}-{_fingerprint(sources)}.compiled"
    if stamp.exists():
        yield
        return
    _copy_code(sources / "__pycache__", folder)
    with announced(COMPILING_SENTENCE), machine_lock(COMPILING):
        yield
        with suppress(OSError):
            stamp.touch()


def _copy_code(beside: Path, folder: Path) -> None:
    if folder != beside:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for file in beside.glob("*.nb[ic]"):
                if not (folder / file.name).exists():
                    shutil.copy2(file, folder)


def _fingerprint(sources: Path) -> str:
    """Return a hash of what the compiled code depends on: numba, this processor, the sources by their dates."""
    parts = [numba.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    for path in sorted(sources.glob("*.py")):
        about = path.stat()
        parts += [path.name, str(about.st_mtime_ns), str(about.st_size)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
