"""The same chain twice, once left alone on this machine, once on a Slurm cluster where things go wrong.

    python -m tools.demo_slurm recipes/demo.yaml --out runs/demo-slurm --reference runs/demo

starts the cluster of tools/devcluster, submits the chain to two of its nodes, has another job take them away in the
first stage, cuts the power of one in the second, and compares the weights that each stage hands on. Exits with 1 if
they differ. The reference is run first where it is not done. `make demo-slurm` calls it.
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

DEVCLUSTER = Path(__file__).parent / "devcluster"
SITE = "devcluster"
# Instead of ten minutes: a few steps of each stage, on all images at the end; no gate was measured for so few.
SHORT = [
    f"stages.{stage}.{change}"
    for stage in ("pretrain", "intermediate", "finetune")
    for change in (
        "schedule.epochs=0.4", "schedule.warmup_epochs=0.05", "checkpoint.every_steps=20", "tracking.log_every_steps=5",
        "gate.metric=null", "gate.at_least=null",
    )
]  # fmt: skip


class DemoError(UserError):
    """The demonstration cannot go on, or has failed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_slurm", description=__doc__.partition("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="run directory of the chain on Slurm")
    parser.add_argument("--reference", type=Path, required=True, help="run directory of the undisturbed chain")
    parser.add_argument("--short", action="store_true", help="few steps of each stage of recipes/demo.yaml")
    given = parser.parse_args()
    try:
        demonstrate(given.recipe, given.out, given.reference, [*given.overrides, *(SHORT if given.short else [])])
    except UserError as error:
        sys.exit(f"demo-slurm: {error}")


def demonstrate(recipe: str, out: Path, reference: Path, overrides: list[str]) -> None:
    """Raises DemoError if the weights differ or something on the way does not come to pass."""
    if out.exists():
        raise DemoError(f"--out {out} exists; remove it, for the chain must be seen from its start")
    ranks = load_site(SITE).ranks
    # The same number of threads rounds alike: the site gives a rank one core, `fcmae run` its share of this machine's.
    os.environ["OMP_NUM_THREADS"] = str(load_site(SITE).cpus_per_task)
    say(f"the chain on this machine, undisturbed: {reference}")
    fcmae("run", recipe, "--out", reference, "--nproc", ranks, *overrides)
    was_up = devcluster("status", check=False).returncode == 0
    devcluster("up")
    os.environ["SLURM_CONF"] = shlex.split(devcluster("env").stdout)[1].partition("=")[2]
    try:
        disturb(recipe, out, overrides)
    finally:
        if not was_up:
            devcluster("down")
    compare(out, reference)


def disturb(recipe: str, out: Path, overrides: list[str]) -> None:
    """Submit the chain, preempt its first stage and kill a node of its second, and wait until it is done."""
    say(f"the chain on Slurm: {out}; see also `fcmae status {out} --watch`")
    fcmae("submit", recipe, "--site", SITE, "--out", out, *overrides)
    run = RunFollower(out)
    first, second = (s.stage for s in run.statuses()[:2])
    trains = until_training(run, first)
    say(f"{first} is at step {trains.step}: a job of higher priority takes every node")
    devcluster("preempt")
    back = until_training(run, first, attempt=trains.attempts + 1)
    say(f"{first} goes on, attempt {back.attempts}; {back.restart_reasons[-1]}")
    trains = until_training(run, second)
    node = newest_host(out / second)
    say(f"{second} is at step {trains.step}: node {node} loses its power")
    devcluster("kill-node", node)
    back = until_training(run, second, attempt=trains.attempts + 1)
    say(f"{second} goes on, attempt {back.attempts}, on {back.nodes}; {back.restart_reasons[-1]}")
    devcluster("start-node", node)
    wait(run, "the chain is done", lambda s: all(stage.state == "done" for stage in s.values()))


def until_training(run: RunFollower, stage: str, attempt: int = 1) -> StageStatus:
    """The stage, as soon as it makes steps in this attempt or a later one.

    Raises:
        DemoError: if it is done before it has come to that attempt: then what should have disturbed it came too late.
    """

    def seen(s: StageStatus) -> bool:
        trains = s.state == "running" and s.step > 0 and s.loss is not None
        return s.state == "done" or (trains and s.attempts >= attempt)

    found = wait(run, f"{stage} trains, attempt {attempt}", lambda statuses: seen(statuses[stage]))[stage]
    if found.attempts < attempt:
        raise DemoError(f"stage {stage} was done before anything could happen to it; give it more epochs")
    return found


def newest_host(stage: Path) -> str:
    """Where rank 0 of the last attempt runs."""
    return json.loads(max((stage / ATTEMPTS_FOLDER).glob("??????.json")).read_text())["host"]


def wait(run: RunFollower, what: str, condition: Callable[[dict[str, StageStatus]], bool]) -> dict[str, StageStatus]:
    """The stages by name, as soon as the condition holds."""
    deadline = time.monotonic() + 3600
    while time.monotonic() < deadline:
        statuses = {s.stage: s for s in run.statuses()}
        if condition(statuses):
            return statuses
        if lost := [s for s in statuses.values() if s.state in ("failed", "cancelled")]:
            raise DemoError(f"stage {lost[0].stage} has {lost[0].state}: {lost[0].reason}; see `fcmae logs {run.name}`")
        time.sleep(0.3)
    raise DemoError(f"waited an hour in vain until {what}; see `fcmae status {run.name}`")


def compare(out: Path, reference: Path) -> None:
    """Print both hashes of each stage's weights; DemoError if two differ."""
    Console(width=160).print(run_table(found := RunFollower(out).statuses()))
    wanted = {s.stage: s.weights_sha256 for s in RunFollower(reference).statuses()}
    for s in found:
        say(f"{s.stage}: weights {s.weights_sha256[:16]} on Slurm, {wanted[s.stage][:16]} undisturbed")
    if differing := [s.stage for s in found if s.weights_sha256 != wanted[s.stage]]:
        raise DemoError(f"the weights of {', '.join(differing)} differ")
    say("every stage has handed on the same bits")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def fcmae(*arguments: object) -> None:
    command = [sys.executable, "-m", "tools.cli", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoError(f"`fcmae {' '.join(command[3:5])}` failed")


def devcluster(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([DEVCLUSTER, *arguments], capture_output=True, text=True, check=False)
    if check and ran.returncode != 0:
        raise DemoError(f"tools/devcluster {arguments[0]}: {ran.stderr.strip()}")
    return ran


if __name__ == "__main__":
    main()
