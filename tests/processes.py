"""Processes that start at once: forked from a server that has imported what takes seconds to import.

`start_fcmae` runs the command in such a process, which forks its ranks in turn. They are real processes, with sessions,
signals and exit codes of their own; only their imports are done before. Where the start-up itself is tested, and in one
run (`tests.support.fcmae_anew`), an interpreter is started for each process.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from cluster.local import LocalLauncher
from pipeline.stage.outcome import Outcome

os.environ.setdefault("DS_ACCELERATOR", "cpu")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.preloaded"])


class Rank(multiprocessing.get_context("fork").Process):
    """A rank forked by its launcher, which takes it for a `subprocess.Popen`."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def fork_rank(launcher: LocalLauncher, stage_directory: Path, environment: Mapping[str, str], log: BinaryIO) -> Rank:
    """Stands in for `LocalLauncher.start_rank` in processes of the server."""
    rank = Rank(target=_be_a_rank, args=(stage_directory, environment, log.fileno()))
    rank.start()
    return rank


def _be_a_rank(stage_directory: Path, environment: Mapping[str, str], log: int) -> None:
    from pipeline.tracking.startup import startup
    from tests import faulty_rank

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _settle(environment, log, log)
    startup.__init__()  # it counts from the start of the process
    sys.argv = ["pipeline.run", str(stage_directory)]
    faulty_rank.main()


def _settle(environment: Mapping[str, str], out: int, error: int) -> None:
    """Make a forked process what a new one would be: its own session, environment, standard output and error."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(out, 1)
    os.dup2(error, 2)


class Forked:
    """A process of the server, with those methods of `subprocess.Popen` that tests need."""

    def __init__(self, work: Callable[..., None], *arguments: object, **environment: str):
        self._outputs = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 (they live as long as this)
        self._process = PROCESSES.Process(
            target=_work,
            args=(
                os.getcwd(), {**os.environ, "OMP_NUM_THREADS": "1", **environment},
                *(output.name for output in self._outputs), work, arguments,
            ),
        )  # fmt: skip
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, *self.said())
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        """What it has written to standard output and error so far."""
        return tuple(Path(output.name).read_text() for output in self._outputs)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    def children(self) -> list[int]:
        """The processes that it has started and that live, the first one first: of a launcher its ranks."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()


def _work(
    folder: str, environment: Mapping[str, str], out: str, error: str, work: Callable[..., None], arguments: tuple
) -> None:
    os.chdir(folder)
    _settle(environment, os.open(out, os.O_WRONLY | os.O_APPEND), os.open(error, os.O_WRONLY | os.O_APPEND))
    LocalLauncher.start_rank = fork_rank
    work(*arguments)


def start_fcmae(*arguments: object, **environment: str) -> Forked:
    """The command, as a process that runs."""
    return Forked(_be_the_command, *map(str, arguments), **environment)


def _be_the_command(*arguments: str) -> None:
    from tools import cli

    sys.argv = ["fcmae", *arguments]
    cli.main()


def start_stage(stage: Path, processes: int, faults: Mapping[str, Any] | None = None) -> Forked:
    """The launcher of a stage, as a process that runs; its exit code is the outcome's. `faults`: see `faulty_rank`."""
    return Forked(_launch, stage, processes, None, FAULTS=json.dumps(faults or {}))


def run_stage(stage: Path, processes: int, faults: Mapping[str, Any] | None = None) -> Outcome:
    """The outcome of a stage, launched in a process of its own."""
    outcome, answer = PROCESSES.Pipe(duplex=False)
    with Forked(_launch, stage, processes, answer, FAULTS=json.dumps(faults or {})) as launcher:
        answer.close()
        try:
            return outcome.recv()
        except EOFError:
            raise RuntimeError("\n".join(launcher.said())) from None


def _launch(stage: Path, processes: int, answer: Connection | None) -> None:
    with LocalLauncher(processes) as launcher:
        outcome = launcher.run(stage)
    if answer:
        answer.send(outcome)
    print(outcome.reason)
    sys.exit(outcome.kind.exit_code)
