"""A Slurm whose commands are scripts of a few lines."""

import shutil
from pathlib import Path

from cluster.slurm.client import TICKET, job_name

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct")


class FakeSlurm:
    """Scripts in the place of Slurm's commands, which fail until a test says what they do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder, folder / "calls"
        folder.mkdir()
        for command in COMMANDS:
            self.install(command, f"echo 'no test expects {command}' >&2; exit 1")

    def install(self, command: str, script: str) -> None:
        """Make a command of a shell script."""
        path = self.folder / command
        path.write_text(f'#!/bin/sh\necho {command} "$@" >>{self._calls}\n{script}\n')
        path.chmod(0o755)

    def answer(self, command: str, *answers: str) -> None:
        """Make a command print these texts, one a call; the last one for ever."""
        left = self.folder / f"{command}.answers"
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for number, text in enumerate(answers):
            (left / f"{number:03d}").write_text(text)
        self.install(command, f"cd {left}; set -- *; cat $1; [ $# -eq 1 ] || rm $1")

    def calls(self, command: str = "") -> list[str]:
        """What was called: a command and its arguments a line."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if line.startswith(command)]


def queued(
    id: int, state: str, stage: Path, *, reason: str = "None", nodes: str = "", after: int | str | None = None,
    ticket: bool = False,
) -> str:  # fmt: skip
    """A line of squeue, as `cluster.slurm.client` asks for it. `ticket`: a job that is just being submitted."""
    name, priority = job_name(stage) + TICKET * ticket, 0 if ticket else 4294901759
    dependency = f"afterok:{after}(unfulfilled)" if after else "(null)"
    return f"{id}|{state}|{reason}|{nodes}|{dependency}|{priority}|{name}|{stage}\n"
