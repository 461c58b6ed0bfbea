"""Notices that a stage stands still, and says which rank does, on which host, at which step and doing what.

Each rank tells its progress in a small file of the stage, `health/<attempt>/rank-00000.beat`, written by a thread that
also watches: a rank that has not moved for long looks who is behind. Whoever is silent (stopped, dead, or stuck in code
that never lets another thread run) or has made the fewest moves is the one the others wait for. Where there are no
others, `sentinel` notices the silence.

A rank only ever counts time during which its own thread ran, so a machine that was suspended raises no alarm.
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

T = TypeVar("T")

GLOO_SIGNS = ("gloo/transport", "timeout caused pair closure")  # gloo's errors are plain RuntimeErrors
BEAT_BYTES = 512  # all beats are as long, so that writing one over another leaves nothing of it

# Makes a rank write its stacks, even one that never gives another thread a turn. Only for a rank that is to end: the
# stacks of threads that run meanwhile may crash it.
STACKS_SIGNAL = signal.SIGRTMIN + 5
PATIENCE = 5  # times stall_seconds, where nothing can be seen to move: loading, compiling, saving, evaluating
SYNCHRONISE = "synchronise"
PATIENT = ("start", "save", "evaluate", "roll back", "finish")
MEET_SECONDS = 10.0  # the most that a rank waits for the others to write their stacks


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself. All ranks make the same moves (changes of phase), so fewer means behind."""

    rank: int
    host: str
    pid: int
    moves: int = 0
    step: int = 0
    phase: str = "start"
    still_seconds: float = 0.0
    """Since its last move."""
    allowed_seconds: float = 0.0
    """How long it may stay in this phase."""
    beats: int = 0
    """Grows while its watching thread gets to run."""
    left: bool = False
    """It has said goodbye: it is not to blame for its silence."""
    accuses: bool = False
    """It has seen the standstill, written its stacks and waits for the others to do so."""

    @property
    def overdue(self) -> bool:
        return self.still_seconds >= self.allowed_seconds


def blame(beats: Mapping[int, Beat], silent: Iterable[int]) -> tuple[str, int] | None:
    """The sentence about who holds everybody up, and the step; None if nobody takes longer than allowed.

    beats: the last known of each rank that has not left. silent: ranks whose beat stopped changing.
    """
    silent = [beats[rank] for rank in silent]
    step = max(beat.step for beat in beats.values())
    waiting = sorted(beats.keys() - {beat.rank for beat in silent})
    others = f"; rank{'s' * (len(waiting) > 1)} {_listed(waiting)} waited for it in {_phases(beats, waiting)}"
    if silent:
        who = "; ".join(f"rank {b.rank} on {b.host} gave no sign of life after {_where(b)}" for b in silent)
        return who + (others if waiting else ""), step
    fewest = min(beat.moves for beat in beats.values())
    behind = [beat for beat in beats.values() if beat.moves == fewest]
    if not all(beat.overdue for beat in behind):
        return None
    if len(behind) == len(beats) > 1:
        return f"all {len(beats)} ranks stand still in {_where(behind[0])}: a collective between them hangs", step
    who = "; ".join(f"rank {b.rank} on {b.host} has been in {_where(b)} for {b.still_seconds:.0f} s" for b in behind)
    waiting = sorted(beats.keys() - {beat.rank for beat in behind})
    others = f"; rank{'s' * (len(waiting) > 1)} {_listed(waiting)} waited for it in {_phases(beats, waiting)}"
    return who + (others if waiting else ""), step


def _where(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}"


def _phases(beats: Mapping[int, Beat], ranks: list[int]) -> str:
    return " or ".join(sorted({_where(beats[rank]) for rank in ranks}))


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


class Watchdog:
    """This rank's beat and its look at the others. A context manager: what leaves it is no longer watched.

    Args:
        directory: of this attempt, on a file system that all ranks see; made here.
        rank: of `world_size`.
        stall_seconds: without a move after which a rank is called stalled.
        on_stall: called with the sentence and the step, once, in the watching thread of every rank that still can,
            after stacks were written; it ends the process.
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
        self._said: dict[str, object] = {}  # what stays true in every later beat
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
        self._say(left=True)
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._file)
        if not self._stacks.tell():
            self._path(self.rank, "stacks").unlink(missing_ok=True)
        self._stacks.close()

    @property
    def beat_file(self) -> Path:
        """What a rank that is stuck no longer changes."""
        return self._path(self.rank, "beat")

    # -- what the training tells

    def phase(self, name: str, step: int | None = None) -> None:
        """This rank begins something else: a move. `step` is the number that the journal has, or will have."""
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
        """The step's micro-batches, with the phases that can be told from their use."""
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

    def meeting(self, collective: Callable[[int], int]) -> Callable[[int], int]:
        """`collective`, with the phase "synchronise" around it."""

        def meet(value: int) -> int:
            before = self._beat
            self.phase(SYNCHRONISE)
            try:
                return collective(value)
            finally:
                self.phase(before.phase)

        return meet

    # -- watching

    def _watch(self) -> None:
        clock_seconds, moved_at, moves, last = 0.0, 0.0, -1, time.monotonic()
        looks: dict[int, tuple[Beat | None, float]] = {}
        while not self._closed.wait(self.poll_seconds):
            now = time.monotonic()
            clock_seconds, last = clock_seconds + min(now - last, 2 * self.poll_seconds), now
            if self._beat.moves != moves:
                moves, moved_at = self._beat.moves, clock_seconds
            self._count += 1
            self._publish(still_seconds=clock_seconds - moved_at)
            if clock_seconds - moved_at < self.stall_seconds / 2:
                looks.clear()
                continue
            for rank in range(self.world_size):
                beat, since = self._read(rank), clock_seconds
                if rank in looks and (beat is None or beat == looks[rank][0]):
                    beat, since = looks[rank]
                looks[rank] = beat, since
            if clock_seconds - moved_at < self.stall_seconds:
                continue
            silent = [rank for rank, (_, since) in looks.items() if clock_seconds - since >= 0.4 * self.stall_seconds]
            beats = {rank: beat or Beat(rank, "an unknown host", 0) for rank, (beat, _) in looks.items()}
            beats = {rank: beat for rank, beat in beats.items() if not beat.left}
            if self.rank in beats and (found := blame(beats, [rank for rank in silent if rank in beats])):
                self._end(beats, silent, *found)
                return

    def _end(self, beats: dict[int, Beat], silent: list[int], sentence: str, step: int) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._record_flights()
        host = self._beat.host
        if self.rank == min(rank for rank, beat in beats.items() if beat.host == host and rank not in silent):
            for rank in silent:  # they cannot say where they are, unless somebody on their machine makes them
                if rank in beats and beats[rank].host == host:
                    with contextlib.suppress(OSError):
                        os.kill(beats[rank].pid, STACKS_SIGNAL)
                        os.kill(beats[rank].pid, signal.SIGCONT)  # a stopped process takes no signal; it ends anyway
        self._say(accuses=True, still_seconds=beats[self.rank].still_seconds)
        deadline = time.monotonic() + min(MEET_SECONDS, self.stall_seconds)
        awaited = [rank for rank in beats if rank not in silent]
        while time.monotonic() < deadline and not all(
            (b := self._read(rank)) and (b.accuses or b.left) for rank in awaited
        ):
            time.sleep(self.poll_seconds)
        if silent:
            time.sleep(0.5)  # the stacks of the silent ones
        self._on_stall(sentence, step)

    def _record_flights(self) -> None:
        """NCCL's record of the last collectives, where there is one; `torchfrtrace` reads it."""
        import torch

        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            with contextlib.suppress(Exception):  # a debugging aid must not keep the run from ending
                record = torch._C._distributed_c10d._dump_nccl_trace()
                self._path(self.rank, "flights").write_bytes(record)

    # -- a peer that is gone

    def explain_lost_peer(self) -> str | None:
        """After a collective broke: the sentence about the ranks that went without a word; None if all said goodbye."""
        self._say(left=True)
        first = {rank: beat for rank in range(self.world_size) if rank != self.rank and (beat := self._read(rank))}
        lost: list[Beat] = []
        for _ in range(4):  # long enough for a live rank to show itself, and for a failing one to say goodbye
            now = {rank: self._read(rank) or beat for rank, beat in first.items()}
            there = [beat for beat in now.values() if not (beat.left or beat.accuses)]
            near = [beat for beat in there if beat.host == self._beat.host]
            lost = [beat for beat in near if start_time(beat.pid) == 0]
            if not there or lost:
                break
            lost = [beat for beat in there if beat not in near and beat == first[beat.rank]]
            time.sleep(self.poll_seconds)
        if not lost:
            return None
        return "; ".join(f"rank {beat.rank} on {beat.host} was lost in {_where(beat)}" for beat in lost)

    # -- the files

    def _path(self, rank: int, kind: str) -> Path:
        return self.directory / f"rank-{rank:05d}.{kind}"

    def _say(self, **changes: object) -> None:
        self._said |= changes
        self._publish()

    def _publish(self, **changes: object) -> None:
        line = json.dumps(asdict(replace(self._beat, beats=self._count, **{**changes, **self._said})))
        with contextlib.suppress(OSError):  # a full disk stops no training
            os.pwrite(self._file, line.encode().ljust(BEAT_BYTES), 0)

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank, "beat").read_bytes()))
        except (OSError, ValueError, TypeError):  # not there yet, or caught in the middle of a write
            return None


def is_broken_collective(error: BaseException | None) -> bool:
    """Whether the error, or what it came from, is a collective that lost its connection or waited too long."""
    import torch.distributed as dist

    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in GLOO_SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
