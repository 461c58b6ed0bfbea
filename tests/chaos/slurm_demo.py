"""Run the same chain twice, undisturbed on this machine and disturbed on a Slurm cluster, and compare the weights.

    python -m tests.chaos.slurm_demo recipes/demo.yaml --out runs/demo-slurm --reference runs/demo

This starts the cluster of tools/devcluster and submits the chain to two of its nodes. A job of higher priority preempts
the first stage, and a node of the second stage loses power. Then the weights that each stage hands on are compared with
those of the reference, which is trained first if it is not done. Exit code 1 if weights differ. `make demo-slurm` runs
this program.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cluster.show.status import RunFollower, StageStatus
from cluster.show.status_table import run_table
from cluster.site import load_site
from pipeline.errors import UserError
from pipeline.storage.file_names import ATTEMPTS_FOLDER

DEVCLUSTER = Path(__file__).parents[2] / "tools" / "devcluster"
SITE = "devcluster"
WAIT_SECONDS = 3600
# A few steps of each stage, instead of ten minutes. The gates are off because they were measured for whole stages.
SHORT = [
    f"stages.{stage}.{change}"
    for stage in ("pretrain", "intermediate", "finetune")
    for change in (
        "schedule.epochs=0.4", "schedule.warmup_epochs=0.05", "checkpoint.every_steps=20", "tracking.log_every_steps=5",
        "gate.metric=null", "gate.at_least=null",
    )
]  # fmt: skip


class DemoError(UserError):
    """The demonstration failed or cannot continue."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.slurm_demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="run directory of the chain on Slurm")
    parser.add_argument("--reference", type=Path, required=True, help="run directory of the undisturbed chain")
    parser.add_argument("--short", action="store_true", help="train a few steps of each stage of recipes/demo.yaml")
    options = parser.parse_args()
    overrides = [*options.overrides, *(SHORT if options.short else [])]
    try:
        demonstrate(options.recipe, options.out, options.reference, overrides)
    except UserError as error:
        sys.exit(f"demo-slurm: {error}")


def demonstrate(recipe: str, out: Path, reference: Path, overrides: list[str]) -> None:
    """Run both chains and compare them.

    Raises:
        DemoError: if weights differ, or a command or a disturbance fails.
    """
    if out.exists():
        raise DemoError(f"--out {out} exists; remove it, because the chain must start anew")
    site = load_site(SITE)
    # Equal bits need equal numbers of threads: the site gives a rank one core, `fcmae run` all cores of this machine.
    os.environ["OMP_NUM_THREADS"] = str(site.cpus_per_task)
    say(f"the undisturbed chain on this machine: {reference}")
    fcmae("run", recipe, "--out", reference, "--nproc", site.ranks, *overrides)
    was_up = subprocess.run([DEVCLUSTER, "status"], capture_output=True).returncode == 0
    devcluster("up")
    os.environ["SLURM_CONF"] = shlex.split(devcluster("env"))[1].partition("=")[2]
    try:
        disturb(recipe, out, overrides)
    finally:
        if not was_up:
            devcluster("down")
    compare_weights(out, reference)


def disturb(recipe: str, out: Path, overrides: list[str]) -> None:
    """Submit the chain, preempt its first stage, kill a node of its second, and wait until it is done."""
    say(f"the chain on Slurm: {out}; see also `fcmae status {out} --watch`")
    fcmae("submit", recipe, "--site", SITE, "--out", out, *overrides)
    run = RunFollower(out)
    first, second = (status.stage for status in run.statuses()[:2])
    before = until_training(run, first)
    say(f"{first} is at step {before.step}: a job of higher priority takes every node")
    devcluster("preempt")
    resumed = until_training(run, first, attempt=before.attempts + 1)
    say(f"{first} resumed in attempt {resumed.attempts}; {resumed.restart_reasons[-1]}")
    before = until_training(run, second)
    node = newest_host(out / second)
    say(f"{second} is at step {before.step}: node {node} loses power")
    devcluster("kill-node", node)
    resumed = until_training(run, second, attempt=before.attempts + 1)
    say(f"{second} resumed in attempt {resumed.attempts} on {resumed.nodes}; {resumed.restart_reasons[-1]}")
    devcluster("start-node", node)
    wait_until(run, "the chain is done", lambda stages: all(stage.state == "done" for stage in stages.values()))


def until_training(run: RunFollower, stage: str, attempt: int = 1) -> StageStatus:
    """Wait until the stage takes steps in this attempt or a later one; returns its status.

    Raises:
        DemoError: if the stage is done before that attempt, so that it was not disturbed.
    """

    def trains_or_done(statuses: dict[str, StageStatus]) -> bool:
        status = statuses[stage]
        trains = status.state == "running" and status.step > 0 and status.loss is not None
        return status.state == "done" or (trains and status.attempts >= attempt)

    status = wait_until(run, f"{stage} trains, attempt {attempt}", trains_or_done)[stage]
    if status.attempts < attempt:
        raise DemoError(f"stage {stage} was done before it could be disturbed; give it more epochs")
    return status


def newest_host(stage: Path) -> str:
    """The host of rank 0 in the last attempt."""
    return json.loads(max((stage / ATTEMPTS_FOLDER).glob("??????.json")).read_text())["host"]


def wait_until(
    run: RunFollower, event: str, condition: Callable[[dict[str, StageStatus]], bool]
) -> dict[str, StageStatus]:
    """Wait until the condition holds; returns the statuses of the stages by name.

    Raises:
        DemoError: if a stage fails, or after an hour.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        statuses = {status.stage: status for status in run.statuses()}
        if condition(statuses):
            return statuses
        for stage in statuses.values():
            if stage.state in ("failed", "cancelled"):
                raise DemoError(f"stage {stage.stage} has {stage.state}: {stage.reason}; see `fcmae logs {run.name}`")
        time.sleep(0.3)
    raise DemoError(f"waited an hour in vain until {event}; see `fcmae status {run.name}`")


def compare_weights(out: Path, reference: Path) -> None:
    """Print both hashes of each stage's weights.

    Raises:
        DemoError: if two differ.
    """
    statuses = RunFollower(out).statuses()
    Console(width=160).print(run_table(statuses))
    expected = {status.stage: status.weights_sha256 for status in RunFollower(reference).statuses()}
    for status in statuses:
        hashes = f"{status.weights_sha256[:16]} on Slurm, {expected[status.stage][:16]} undisturbed"
        say(f"{status.stage}: weights {hashes}")
    if differing := [status.stage for status in statuses if status.weights_sha256 != expected[status.stage]]:
        raise DemoError(f"the weights of {', '.join(differing)} differ")
    say("all stages hand on the same bits")


def say(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def fcmae(*arguments: object) -> None:
    """Run a command of the program, which prints to this terminal."""
    command = [sys.executable, "-m", "tools.cli", *map(str, arguments)]
    if subprocess.run(command).returncode != 0:
        raise DemoError(f"`fcmae {' '.join(command[3:5])}` failed")


def devcluster(*arguments: str) -> str:
    """Run tools/devcluster and return its output."""
    process = subprocess.run([DEVCLUSTER, *arguments], capture_output=True, text=True)
    if process.returncode != 0:
        raise DemoError(f"tools/devcluster {arguments[0]}: {process.stderr.strip()}")
    return process.stdout


if __name__ == "__main__":
    main()
