"""Stages as processes of this machine, one per rank."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

from pipeline.distributed.processes import LAUNCHER_PID
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import ExitCode, Outcome, OutcomeKind
from pipeline.storage.file_names import LOGS_FOLDER

POLL_SECONDS = 0.1
KILL_AFTER_SECONDS = 120.0  # from the first request to stop; a checkpoint of a large model takes its time
LAST_WORDS_SECONDS = 20.0  # from the first bad end of a rank, for the others to say what they know
_LEAST_FREE_BYTES = 64 * 1024  # with less than that a disk counts as full


class LocalLauncher:
    """Runs a stage in `processes` ranks and waits for them.

    As a context manager it passes SIGINT and SIGTERM on to the ranks, also one that comes between two stages; a second
    one kills.

    Attributes:
        watch: called about twice a second while waiting, to show progress.
    """

    module = "pipeline.run"

    def __init__(self, processes: int, watch: Callable[[], None] = lambda: None):
        self.processes, self.watch = processes, watch
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._stops = 0
        self._ended: dict[int, int] = {}  # exit codes of the ranks that ended by themselves

    def __enter__(self) -> "LocalLauncher":
        self._handlers = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, stage_directory: Path) -> Outcome:
        """Run the stage to an outcome."""
        if self._stops:
            return Outcome(OutcomeKind.SAVED, f"stopped before stage {stage_directory.name} began")
        self._ended, deadline, failed = {}, None, False
        attempts = Stage(stage_directory).attempts.newest()
        meeting = reserve_port()
        try:
            self._start(stage_directory, meeting.getsockname()[1])
            shown = 0.0
            while len(self._codes()) < len(self._ranks):
                time.sleep(POLL_SECONDS)
                if time.monotonic() - shown > 0.5:
                    self.watch()
                    shown = time.monotonic()
                if self._stops and deadline is None:
                    deadline = time.monotonic() + KILL_AFTER_SECONDS
                if not failed and self._codes(but=(ExitCode.DONE, ExitCode.SAVED)):
                    failed, words_until = True, time.monotonic() + LAST_WORDS_SECONDS
                    deadline = min(deadline or words_until, words_until)
                if self._stops > 1 or (deadline and time.monotonic() > deadline):
                    self._kill()  # the others wait for the one that is gone, and would wait for ever
        finally:
            self._kill()
            meeting.close()
        return self._outcome(Stage(stage_directory), attempts)

    def _start(self, stage_directory: Path, port: int) -> None:
        attempt_logs = stage_directory / LOGS_FOLDER
        attempt_logs.mkdir(exist_ok=True)
        shared = {
            "WORLD_SIZE": self.processes,
            "LOCAL_WORLD_SIZE": self.processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            LAUNCHER_PID: os.getpid(),
        }
        threads = max(len(os.sched_getaffinity(0)) // self.processes, 1)
        self._ranks = []
        # A rank told to stop while it still imports torch would just die: it unblocks these once it can obey.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for rank in range(self.processes):
            place = {
                **shared,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            }
            with open(attempt_logs / f"rank-{rank}.log", "ab") as log:
                self._ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", self.module, str(stage_directory)],
                        env={**os.environ, **{name: str(value) for name, value in place.items()}},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
                    )
                )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)

    def _codes(self, but: tuple[int, ...] = ()) -> dict[int, int]:
        """Exit codes, by rank, of the ranks that have ended, without those in `but`."""
        codes = {rank: process.poll() for rank, process in enumerate(self._ranks)}
        return {rank: code for rank, code in codes.items() if code is not None and code not in but}

    def _kill(self) -> None:
        self._ended = self._ended or self._codes()
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
        for rank in self._ranks:
            rank.wait()

    def _outcome(self, stage: Stage, attempts_before: int) -> Outcome:
        codes = set(self._ended.values())
        if codes == {ExitCode.DONE} and (done := stage.done()):
            return Outcome(OutcomeKind.DONE, step=done.step)
        outcome = stage.attempts.last_outcome() if stage.attempts.newest() > attempts_before else None
        # When a rank is killed the others fail for want of it: what they say is not the reason, unless they know of it.
        killed = {rank: code for rank, code in self._ended.items() if code < 0}
        ended_well = codes <= {ExitCode.DONE, ExitCode.SAVED}
        told = outcome and (ended_well or outcome.kind in (OutcomeKind.PERMANENT, OutcomeKind.BAD_NODE))
        if outcome and told and codes and not killed:
            return outcome
        ends = ", ".join(f"rank {rank} {_end(code)}" for rank, code in (killed or self._ended).items())
        if outcome and outcome.kind is OutcomeKind.BAD_NODE and killed:
            return replace(outcome, reason=f"{outcome.reason} ({ends})")
        logs = stage.directory / LOGS_FOLDER
        # On a full disk neither logs nor outcome tell the reason.
        full = shutil.disk_usage(logs).free < _LEAST_FREE_BYTES
        return Outcome(
            OutcomeKind.BAD_NODE if killed else OutcomeKind.PERMANENT,
            f"stage {stage.recipe.name} ended early ({ends or 'killed'}); "
            + (f"the disk of {logs} is full: make room, then run the same command again" if full else f"see {logs}"),
            outcome.step if outcome else None,
        )


def _end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def reserve_port() -> socket.socket:
    """A socket whose port nobody else is given until it is closed, though rank 0 can listen there meanwhile: it imports
    torch before it does, and a port that is only found free may be gone by then.

    Linux gives a bound port to nobody who asks for any. Who asks for this one and for its reuse, as torch does, gets
    it while nobody listens.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
