"""Detect that a stage hangs, and name the rank, its host, the step and the phase.

A thread of each rank writes the rank's progress to a small file of the stage, `health/<attempt>/rank-00000.beat`. The
same thread watches: when its own rank has not moved for long, it reads the beats of all ranks. The others wait for the
ranks that are silent (stopped, dead, or in code that lets no other thread run), or else for those that made the fewest
moves. A single rank cannot notice its own silence; `sentinel` does.

A rank counts only time in which its own thread ran, so suspending a machine raises no alarm.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.distributed.processes import start_time
from pipeline.errors import listed

T = TypeVar("T")

GLOO_SIGNS = ("gloo/transport", "timeout caused pair closure")  # gloo raises plain RuntimeErrors
BEAT_BYTES = 512  # a fixed length, so that a shorter beat overwrites a longer one whole

# Makes a rank write its stacks, even in code that lets no other thread run. Send it only to a rank that is about to
# end, because writing the stacks of running threads may crash the process.
STACKS_SIGNAL = signal.SIGRTMIN + 5
PATIENCE = 5  # times stall_seconds are allowed in phases without moves: loading, compiling, saving, evaluating
SYNCHRONISE = "synchronise"
PATIENT = ("start", "save", "evaluate", "roll back", "finish")
MEET_SECONDS = 10.0  # longest wait for the other ranks to write their stacks


@dataclass(frozen=True)
class Beat:
    """The progress of one rank. All ranks make the same moves (changes of phase), so fewer moves mean behind."""

    rank: int
    host: str
    pid: int
    moves: int = 0
    step: int = 0
    phase: str = "start"
    still_seconds: float = 0.0
    """Time since the last move."""
    allowed_seconds: float = 0.0
    """Longest time allowed in this phase."""
    beats: int = 0
    """Grows while the rank's watching thread runs."""
    left: bool = False
    """The rank exited cleanly; do not report its missing heartbeat."""
    accuses: bool = False
    """The rank has seen that the stage hangs, has written its stacks, and waits for the others to do so."""

    @property
    def overdue(self) -> bool:
        return self.still_seconds >= self.allowed_seconds


def blame(beats: Mapping[int, Beat], silent: Iterable[int]) -> tuple[str, int] | None:
    """Name the ranks that the others wait for; returns a sentence and the step, None if no phase took too long.

    Args:
        beats: the last known beat of each rank that has not left.
        silent: ranks whose beat stopped changing.
    """
    culprits = [beats[rank] for rank in silent]
    step = max(beat.step for beat in beats.values())
    if culprits:
        who = "; ".join(f"rank {b.rank} on {b.host} gave no sign of life after {_where(b)}" for b in culprits)
        return who + _waiting(beats, culprits), step
    fewest = min(beat.moves for beat in beats.values())
    behind = [beat for beat in beats.values() if beat.moves == fewest]
    if not all(beat.overdue for beat in behind):
        return None
    if len(behind) == len(beats) > 1:
        return f"all {len(beats)} ranks stand still in {_where(behind[0])}: a collective between them hangs", step
    who = "; ".join(f"rank {b.rank} on {b.host} has been in {_where(b)} for {b.still_seconds:.0f} s" for b in behind)
    return who + _waiting(beats, behind), step


def _where(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}"


def _waiting(beats: Mapping[int, Beat], culprits: list[Beat]) -> str:
    """The end of the sentence: which other ranks waited, and in which phases."""
    waiting = sorted(beats.keys() - {beat.rank for beat in culprits})
    if not waiting:
        return ""
    ranks = listed(list(map(str, waiting)), 4)
    phases = " or ".join(sorted({_where(beats[rank]) for rank in waiting}))
    return f"; rank{'s' * (len(waiting) > 1)} {ranks} waited for it in {phases}"


class Watchdog:
    """Writes this rank's beat and watches the other ranks, while its context is open.

    Args:
        directory: health directory of this attempt, on a file system that all ranks see; created here.
        stall_seconds: a rank that makes no move for this long has stalled.
        on_stall: ends the process. Called once with the sentence and the step, after the stacks were written, in the
            watching thread of every rank that still runs.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        stall_seconds: float,
        on_stall: Callable[[str, int], None],
    ):
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self.stall_seconds, self._on_stall = stall_seconds, on_stall
        self.poll_seconds = min(stall_seconds / 20, 2.0)
        self._first_step: int | None = None
        self._beat = Beat(rank, socket.gethostname(), os.getpid(), allowed_seconds=PATIENCE * stall_seconds)
        self._count = 0
        self._fixed: dict[str, object] = {}  # fields that every later beat has
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path(self.rank, "beat"), os.O_CREAT | os.O_WRONLY, 0o644)
        self._stacks = open(self._path(self.rank, "stacks"), "ab", buffering=0)
        faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True, chain=False)
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._publish_always(left=True)
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._file)
        if not self._stacks.tell():
            self._path(self.rank, "stacks").unlink(missing_ok=True)
        self._stacks.close()

    @property
    def beat_file(self) -> Path:
        """The file that this rank rewrites while it runs."""
        return self._path(self.rank, "beat")

    # -- called by the training

    def phase(self, name: str, step: int | None = None) -> None:
        """Begin a phase, which is a move. `step` has the journal's numbering; None keeps the step."""
        beat = self._beat
        step = beat.step if step is None else step
        if self._first_step is None and name not in (*PATIENT, SYNCHRONISE):  # the ranks meet before they begin, too
            self._first_step = step
        patient = name in PATIENT or self._first_step in (None, step)
        self._beat = replace(
            beat,
            moves=beat.moves + 1,
            step=step,
            phase=name,
            allowed_seconds=self.stall_seconds * (PATIENCE if patient else 1),
        )

    def batches(self, batches: Iterable[T], step: int) -> Iterator[T]:
        """Iterate over a step's micro-batches, and begin the phases "data", "forward and backward" and "update"."""
        batches = iter(batches)
        while True:
            self.phase("data", step)
            try:
                batch = next(batches)
            except StopIteration:
                self.phase("update")
                return
            self.phase("forward and backward")
            yield batch

    def meeting(self, collective: Callable[[], T]) -> Callable[[], T]:
        """Wrap a wait for the other ranks in the phase "synchronise"."""

        def meet() -> T:
            before = self._beat
            self.phase(SYNCHRONISE)
            try:
                return collective()
            finally:
                self.phase(before.phase)

        return meet

    # -- watching

    def _watch(self) -> None:
        """Beat, and compare the beats of all ranks once this rank has not moved for half of `stall_seconds`."""
        clock_seconds, moved_at, moves, last = 0.0, 0.0, -1, time.monotonic()
        seen: dict[int, tuple[Beat | None, float]] = {}  # of each rank its beat, and since when it has not changed
        while not self._closed.wait(self.poll_seconds):
            now = time.monotonic()
            clock_seconds, last = clock_seconds + min(now - last, 2 * self.poll_seconds), now
            if self._beat.moves != moves:
                moves, moved_at = self._beat.moves, clock_seconds
            self._count += 1
            self._publish(still_seconds=clock_seconds - moved_at)
            if clock_seconds - moved_at < self.stall_seconds / 2:
                seen.clear()
                continue
            for rank in range(self.world_size):
                beat, since = self._read(rank), clock_seconds
                if rank in seen and (beat is None or beat == seen[rank][0]):
                    beat, since = seen[rank]
                seen[rank] = beat, since
            if clock_seconds - moved_at < self.stall_seconds:
                continue
            silent = [rank for rank, (_, since) in seen.items() if clock_seconds - since >= 0.4 * self.stall_seconds]
            beats = {rank: beat or Beat(rank, "an unknown host", 0) for rank, (beat, _) in seen.items()}
            beats = {rank: beat for rank, beat in beats.items() if not beat.left}
            if self.rank in beats and (verdict := blame(beats, [rank for rank in silent if rank in beats])):
                self._end(beats, silent, *verdict)
                return

    def _end(self, beats: dict[int, Beat], silent: list[int], sentence: str, step: int) -> None:
        """Write the stacks, also of silent ranks on this machine, wait for the other ranks to do so, and end."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._record_flights()
        host = self._beat.host
        if self.rank == min(rank for rank, beat in beats.items() if beat.host == host and rank not in silent):
            for rank in silent:  # only a process on their own machine can make them write their stacks
                if rank in beats and beats[rank].host == host:
                    with contextlib.suppress(OSError):
                        os.kill(beats[rank].pid, STACKS_SIGNAL)
                        os.kill(beats[rank].pid, signal.SIGCONT)  # a stopped process handles no signal
        self._publish_always(accuses=True, still_seconds=beats[self.rank].still_seconds)
        deadline = time.monotonic() + min(MEET_SECONDS, self.stall_seconds)
        awaited = [rank for rank in beats if rank not in silent]
        while time.monotonic() < deadline and not all(
            (b := self._read(rank)) and (b.accuses or b.left) for rank in awaited
        ):
            time.sleep(self.poll_seconds)
        if silent:
            time.sleep(0.5)  # for the silent ranks to write their stacks
        self._on_stall(sentence, step)

    def _record_flights(self) -> None:
        """Write NCCL's record of the last collectives, if there is one; `torchfrtrace` reads it."""
        import torch

        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            with contextlib.suppress(Exception):  # a debugging aid must not keep the run from ending
                record = torch._C._distributed_c10d._dump_nccl_trace()
                self._path(self.rank, "flights").write_bytes(record)

    # -- a lost peer

    def explain_lost_peer(self) -> str | None:
        """Name the ranks that ended without leaving, after a collective broke; None if all left cleanly."""
        self._publish_always(left=True)
        first = {rank: beat for rank in range(self.world_size) if rank != self.rank and (beat := self._read(rank))}
        lost: list[Beat] = []
        for _ in range(4):  # long enough for a live rank to beat, and for a failing rank to leave
            now = {rank: self._read(rank) or beat for rank, beat in first.items()}
            open_beats = [beat for beat in now.values() if not (beat.left or beat.accuses)]
            local = [beat for beat in open_beats if beat.host == self._beat.host]
            lost = [beat for beat in local if start_time(beat.pid) == 0]
            if not open_beats or lost:
                break
            lost = [beat for beat in open_beats if beat not in local and beat == first[beat.rank]]
            time.sleep(self.poll_seconds)
        if not lost:
            return None
        return "; ".join(f"rank {beat.rank} on {beat.host} was lost in {_where(beat)}" for beat in lost)

    # -- the files

    def _path(self, rank: int, kind: str) -> Path:
        return self.directory / f"rank-{rank:05d}.{kind}"

    def _publish_always(self, **changes: object) -> None:
        """Publish the beat with these fields, and keep them in all later beats. Other nodes wait for such a beat, and
        over NFS they would see it half a minute later without the flush."""
        self._fixed |= changes
        self._publish()
        with contextlib.suppress(OSError):
            os.fsync(self._file)

    def _publish(self, **changes: object) -> None:
        line = json.dumps(asdict(replace(self._beat, beats=self._count, **{**changes, **self._fixed})))
        with contextlib.suppress(OSError):  # a full disk must not stop the training
            os.pwrite(self._file, line.encode().ljust(BEAT_BYTES), 0)

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank, "beat").read_bytes()))
        except (OSError, ValueError, TypeError):  # not written yet, or half written
            return None


def is_broken_collective(error: BaseException | None) -> bool:
    """Whether the error, or a cause of it, is a collective that lost its connection or timed out."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in GLOO_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
