"""Run stages as processes of this machine, one per rank."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO

from cluster.site import Site
from cluster.slurm.retry import committed_step
from pipeline.distributed.processes import LAUNCHER_PID, module_command
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.stage.directory import Stage
from pipeline.stage.environment import CODE, ROOT
from pipeline.stage.outcome import ExitCode, Outcome, OutcomeKind
from pipeline.storage.file_names import LOGS_FOLDER

POLL_SECONDS = 0.1
WATCH_SECONDS = 0.5
KILL_AFTER_SECONDS = 120.0  # after the first request to stop, because saving a large model takes long
KILL_AFTER_FAILURE_SECONDS = 20.0  # after the first failure of a rank, so that the others can record what they know
FULL_DISK_BYTES = 64 * 1024  # a disk with less free space counts as full


class LocalLauncher:
    """Runs a stage in several ranks and waits for them.

    As a context manager it passes SIGINT and SIGTERM on to the ranks, which save and stop; a second signal kills them.
    A signal between two stages keeps the next one from starting.

    Args:
        processes: how many ranks.
        watch: called about twice a second while waiting, to show progress.
    """

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

    @property
    def stopped(self) -> bool:
        """Whether a signal has asked for a stop."""
        return self._stops > 0

    def run(self, stage_directory: Path) -> Outcome:
        """Run the stage until its ranks have ended, and return how."""
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
                if time.monotonic() - shown > WATCH_SECONDS:
                    self.watch()
                    shown = time.monotonic()
                if self._stops and deadline is None:
                    deadline = time.monotonic() + KILL_AFTER_SECONDS
                if not failed and set(self._codes().values()) - {ExitCode.DONE, ExitCode.SAVED}:
                    failed, failure_deadline = True, time.monotonic() + KILL_AFTER_FAILURE_SECONDS
                    deadline = min(deadline or failure_deadline, failure_deadline)
                if self._stops > 1 or (deadline and time.monotonic() > deadline):
                    self._kill()  # ranks that wait for one that is gone would wait for ever
        finally:
            self._kill()
            meeting.close()
        return self._outcome(Stage(stage_directory), attempts)

    def _start(self, stage_directory: Path, port: int) -> None:
        (stage_directory / LOGS_FOLDER).mkdir(exist_ok=True)
        shared = {
            "WORLD_SIZE": self.processes,
            "LOCAL_WORLD_SIZE": self.processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            LAUNCHER_PID: os.getpid(),
            CODE: ROOT,
        }
        threads = max(len(os.sched_getaffinity(0)) // self.processes, 1)
        self._ranks = []
        # A stop signal would kill a rank that still imports torch. The rank unblocks the signals once it handles them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for rank in range(self.processes):
            own = {
                **shared,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            }
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            with open(rank_log(stage_directory, rank), "ab") as log:
                self._ranks.append(self.start_rank(stage_directory, environment, log))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def start_rank(self, stage_directory: Path, environment: dict[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start one rank, as a process that writes to `log`."""
        return subprocess.Popen(
            module_command("pipeline.run", stage_directory),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def _codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, by rank."""
        codes = {rank: process.poll() for rank, process in enumerate(self._ranks)}
        return {rank: code for rank, code in codes.items() if code is not None}

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
        # After a rank was killed the others fail because it is gone, so their reason does not count.
        killed = {rank: code for rank, code in self._ended.items() if code < 0}
        ended_well = codes <= {ExitCode.DONE, ExitCode.SAVED}
        explains = outcome and (ended_well or outcome.kind in (OutcomeKind.PERMANENT, OutcomeKind.BAD_NODE))
        if outcome and explains and codes and not killed:
            return outcome
        ends = ", ".join(f"rank {rank} {_end_of_rank(code)}" for rank, code in (killed or self._ended).items())
        if outcome and outcome.kind is OutcomeKind.BAD_NODE and killed:
            return replace(outcome, reason=f"{outcome.reason} ({ends})")
        logs = stage.directory / LOGS_FOLDER
        # On a full disk neither the logs nor the outcome hold the reason.
        full = shutil.disk_usage(logs).free < FULL_DISK_BYTES
        return Outcome(
            OutcomeKind.BAD_NODE if killed else OutcomeKind.PERMANENT,
            f"stage {stage.recipe.name} ended early ({ends or 'killed'}); "
            + (f"the disk of {logs} is full: make room, then run the same command again" if full else f"see {logs}"),
            outcome.step if outcome else None,
        )


def retrying(launcher: LocalLauncher, report: Callable[[str], None]) -> Callable[[Path], Outcome]:
    """Return what runs a stage and, as on Slurm, runs it again when a process was lost or hung.

    It gives up when as many attempts in a row as a site allows by default have committed no new step.

    Args:
        report: gets a sentence before each new attempt.
    """
    most = Site.model_fields["attempts_without_progress"].default

    def run(stage_directory: Path) -> Outcome:
        committed, count = committed_step(stage_directory), 0
        while True:
            outcome = launcher.run(stage_directory)
            if outcome.kind is not OutcomeKind.BAD_NODE or launcher.stopped:
                return outcome
            before, committed = committed, committed_step(stage_directory)
            count = count + 1 if committed == before else 1
            if count >= most:
                return replace(outcome, reason=f"{outcome.reason}; {count} attempts in a row saved nothing new")
            report(f"{stage_directory.name}: {outcome.reason}; it is retried")

    return run


def _end_of_rank(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


def rank_log(stage_directory: Path, rank: int) -> Path:
    """The file of a rank's output."""
    return stage_directory / LOGS_FOLDER / f"rank-{rank}.log"


def reserve_port() -> socket.socket:
    """Reserve a port of this machine for rank 0, which listens there seconds later, after it has imported torch.

    Returns:
        A socket that holds the port until it is closed. Linux does not give a bound port to processes that ask for any
        free one; torch asks for this very port with SO_REUSEADDR and gets it while nobody listens.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
