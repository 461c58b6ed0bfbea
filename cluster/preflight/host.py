"""Check a node without its GPUs: memory, ranks left over from earlier attempts, disks, the clock."""

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from cluster.check_results import CheckResult, Level
from cluster.preflight.settings import Expectations
from pipeline.storage.folder import UNANSWERED

T = TypeVar("T")
GIB = 2**30
DISK_PROBE_BYTES = 4 * 2**20
# Modules that ranks are started by, locally and under Slurm. Other processes that name the stage do not train it.
RANK_MODULES = ("pipeline.run", "submitit.core._submit", "cluster.slurm.worker")
# Errors of a shared directory that another node may not have, unlike a full disk, a quota or a permission.
NODE_ERRNOS = UNANSWERED | {errno.EROFS, errno.ENOENT}


def check_host(expected: Expectations) -> Iterator[CheckResult]:
    """Run the checks of this module."""
    for check in (_memory, _strays, _disks, _clock):
        yield from check(expected)


def _memory(expected: Expectations) -> Iterator[CheckResult]:
    free, needed = available_memory_bytes() / GIB, expected.settings.host_memory_gib
    level = Level.BAD_NODE if free < needed else Level.OK
    remedy = "" if free >= needed else "see what else runs there, or ask for more memory"
    yield CheckResult("memory", level, f"{free:.1f} GiB free, {needed:g} needed", remedy, free)


def available_memory_bytes() -> int:
    """Memory that can be allocated: the machine's, or less where a control group (version 2) limits it."""
    available = psutil.virtual_memory().available
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].split("::", 1)[1].lstrip("/")
    except (OSError, IndexError):
        return available
    group = Path("/sys/fs/cgroup") / own
    for folder in (group, *group.parents):
        try:
            limit = int((folder / "memory.max").read_text())
            statistic = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(statistic["inactive_file"])
        except (OSError, ValueError, KeyError):  # this group has no limit
            continue
        available = min(available, max(limit - used, 0))
    return available


def _strays(expected: Expectations) -> Iterator[CheckResult]:
    deadline = time.monotonic() + expected.settings.stray_seconds
    while (strays := stray_ranks(expected.stage_directory)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not strays:
        yield CheckResult("processes", Level.OK, "no rank of an earlier attempt", value=0)
        return
    detail = f"ranks of an earlier attempt still run: {', '.join(strays)}"
    yield CheckResult("processes", Level.BAD_NODE, detail, "end them; Slurm's slurmd may have lost them", len(strays))


def stray_ranks(stage_directory: Path) -> list[str]:
    """List this node's processes that run the stage for another job, or for an earlier start of this job, as
    `pid (name)`."""
    stage, strays = str(Path(stage_directory).resolve()), []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            names_stage = any(word == stage or word.startswith(stage + os.sep) for word in words)
            if names_stage and any(module in words for module in RANK_MODULES) and not is_ours(process):
                strays.append(f"{process.pid} ({process.name()})")
        except psutil.Error:  # the process is gone, or another user's
            continue
    return strays


def is_ours(process: psutil.Process) -> bool:
    """Whether a process is a rank of this start: of the same job and restart; outside of Slurm, of the same parent."""
    if process.pid == os.getpid():
        return True
    if "SLURM_JOB_ID" not in os.environ:
        return process.ppid() == os.getppid()
    return _start_of_job(process.environ()) == _start_of_job(dict(os.environ))


def _start_of_job(environment: dict[str, str]) -> tuple[str | None, str]:
    return environment.get("SLURM_JOB_ID"), environment.get("SLURM_RESTART_COUNT") or "0"


def _disks(expected: Expectations) -> Iterator[CheckResult]:
    settings = expected.settings
    folders = [("scratch", expected.scratch, True)] if expected.scratch else []
    for name, folder, local in [*folders, ("run directory", expected.stage_directory, False)]:
        answer = _within(settings.disk_timeout_seconds, partial(probe_disk, folder, make=local))
        if answer is None:
            detail = f"{folder} did not take 4 MiB within {settings.disk_timeout_seconds:g} s"
            yield CheckResult(name, Level.BAD_NODE, detail, "the mount may hang: see dmesg there")
        elif isinstance(answer, OSError):
            to_blame = local or answer.errno in NODE_ERRNOS
            detail = f"{folder}: {answer.strerror}"
            remedy = "look at the mount on that node" if to_blame else "make room, or give the run another directory"
            yield CheckResult(name, Level.BAD_NODE if to_blame else Level.MISSING, detail, remedy)
        else:
            free, seconds = answer
            detail = f"{folder}: {free / GIB:.1f} GiB free, 4 MiB written and read in {seconds * 1000:.0f} ms"
            if free / GIB < settings.disk_gib:
                level = Level.BAD_NODE if local else Level.MISSING
                yield CheckResult(name, level, f"{detail}; {settings.disk_gib:g} GiB needed", "make room", free / GIB)
            else:
                yield CheckResult(name, Level.OK, detail, value=free / GIB)


def probe_disk(folder: Path, make: bool) -> tuple[int, float]:
    """Write, sync and read back some random bytes; (free bytes, seconds). `make`: create the folder first."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    content, began = os.urandom(DISK_PROBE_BYTES), time.perf_counter()
    with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if Path(file.name).read_bytes() != content:
            raise OSError(errno.EIO, "the disk returned other bytes than were written")
    return shutil.disk_usage(folder).free, time.perf_counter() - began


def _clock(expected: Expectations) -> Iterator[CheckResult]:
    offset = _within(expected.settings.disk_timeout_seconds, lambda: clock_offset_seconds(expected.stage_directory))
    if offset is None or isinstance(offset, OSError):
        yield CheckResult("clock", Level.SKIPPED, f"{expected.stage_directory} cannot be written")
    elif abs(offset) > expected.settings.clock_seconds:
        detail = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the shared file system's"
        # No decision depends on clocks, so training may go on; times in the journal and in MLflow are wrong.
        yield CheckResult("clock", Level.WARNING, detail, "see whether its time service (chrony, ntpd) runs", offset)
    else:
        yield CheckResult("clock", Level.OK, f"{offset:+.2f} s against the shared file system's", value=offset)


def clock_offset_seconds(folder: Path) -> float:
    """This node's clock minus the clock of the file server of `folder`, which utime without a time uses."""
    with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=folder) as file:
        before = time.time()
        os.utime(file.name)
        return (before + time.time()) / 2 - os.stat(file.name).st_mtime


def _within(seconds: float, work: Callable[[], T]) -> T | OSError | None:
    """What `work` returns, or its OSError; None if it takes longer. Its thread is then left behind, because nothing
    ends a thread that waits for a hung mount."""
    answer: list[T | OSError] = []

    def run() -> None:
        try:
            answer.append(work())
        except OSError as error:
            answer.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
