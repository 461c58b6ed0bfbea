"""Every fault in every stage of a chain on a real Slurm, and the bits at the end:

    python -m tests.chaos.slurm_matrix [--only FAULT ...] [--stages STAGE ...] [--settings N ...]

Each fault has a chain of its own, which ends with the last of the stages given, and strikes once in each of them; the
weights are compared with those of `fcmae run` on as many ranks. Preemption is tried under all four GraceTime and
user-signal settings, everything else under the first. Exit code 0 if all weights are equal.

    python -m tests.chaos.slurm_matrix --storm 20 [--seed S]

Instead of one fault after the other: so many of them, drawn at random with the stage's step they strike at, over one
chain.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from cluster.site import load_site
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.tracking import journal
from tests.slurm.devcluster import (
    FAULTS,
    PREEMPTION,
    STRIKE_AT,
    attempts_of,
    devcluster,
    is_done,
    job_of,
    rank_pid,
    restarts,
    steps_taken,
    strike,
    wait_for,
)  # fmt: skip
from tests.slurm.slow_stages import slow_down, submitting_slow_stages
from tests.support import fcmae, write_tiny_recipe
from tools.run import commands as run_commands

STAGES = ("pretrain", "intermediate", "finetune")
PATIENCE_SECONDS = 900
SHARED = (
    "defaults.tracking.log_every_steps=1",
    "defaults.checkpoint.every_steps=20",
    "defaults.evaluation.every_epochs=10",
)


def long_recipe(directory: Path, stages: Sequence[str] = STAGES, epochs: int = 20) -> Path:
    """The tiny chain's first stages, six steps an epoch: long enough to be struck in the middle."""
    epochs = [f"stages.{stage}" + (f".schedule.epochs={epochs}" if stage in stages else "=null") for stage in STAGES]
    return write_tiny_recipe(directory, [*SHARED, *epochs])


def digests(run: Path, stages: Sequence[str] = STAGES) -> list[str]:
    return [json.loads((run / stage / "DONE").read_text())["weights_sha256"] for stage in stages]


def submit(recipe: Path, run: Path, site: object = "devcluster") -> None:
    """A chain whose stages are slow where a test has said so."""
    with submitting_slow_stages():
        run_commands.submit_run(str(recipe), str(site), run)


def wait_done(run: Path, last: str = STAGES[-1]) -> None:
    wait_for((run / last / "DONE").exists, "the chain's end", PATIENCE_SECONDS)


def story(stage: Path) -> str:
    """Starts and ends of a stage's attempts, by step."""
    ends = sorted((stage / "attempts").glob("*.outcome.json"))
    said = [f"{json.loads(p.read_text())['kind']}@{json.loads(p.read_text())['step']}" for p in ends]
    starts = [str(e["step"]) for e in journal.read_events(stage / "journal.jsonl") if e["kind"] == "attempt"]
    return f"starts at {','.join(starts)}; ends {' '.join(said)}"


def one(recipe: Path, run: Path, stages: list[str], fault: str) -> list[str]:
    """A chain that suffers the fault in each of the stages; a line about each."""
    slow_down(run, **dict.fromkeys(stages, STRIKE_AT))
    submit(recipe, run)
    told = []
    for directory in (run / stage for stage in stages):
        told.append(f"{directory.name}: next step after {strike(directory, FAULTS[fault]):.0f} s")
    wait_done(run, stages[-1])
    return [f"{line}; {story(run / stage)}" for line, stage in zip(told, stages, strict=True)]


def storm(recipe: Path, run: Path, count: int, seed: int, faults: Sequence[str] = tuple(FAULTS)) -> list[str]:
    """A chain that suffers so many faults, spread over its stages, at steps drawn at random; a line about each, printed
    too as they come. All of `faults` come once before one comes again. The chain is submitted once, and nobody helps
    it."""
    draw, stages = random.Random(seed), [run / name for name in load_recipe(recipe).stages]
    site = run.with_name(f"{run.name}-site.yaml")
    patient = {"attempts_without_progress": 20}  # several faults before the first checkpoint are bad luck here
    site.write_text(yaml.safe_dump({**load_site("devcluster").model_dump(mode="json"), **patient}))
    slow_down(run, **{stage.name: 0 for stage in stages})  # whatever comes first
    submit(recipe, run, site)
    most = 25 if count <= 8 else 12  # so that a stage is not done before its last fault
    told: list[str] = []
    struck: dict[Path, int] = {}  # the newest attempt when the last fault came
    while len(told) < count:
        for fault in draw.sample(faults, min(len(faults), count - len(told))):
            stage = stages[len(told) * len(stages) // count]
            at_step = draw.choice([0, *[draw.randint(1, most)] * 4])  # 0: in the middle of its start
            later = stages[stages.index(stage) + 1 :]
            slow_down(run, **{stage.name: at_step}, **{other.name: 0 for other in later})
            ready = partial(strikes, stage, at_step, struck.get(stage, 0))
            wait_for(lambda stage=stage, ready=ready: is_done(stage) or ready(), f"step {at_step}", PATIENCE_SECONDS)
            if is_done(stage):
                raise RuntimeError(f"{stage.name} was done before all {count} faults had come; give it more epochs")
            job, clock = job_of(stage), time.monotonic()
            before, struck[stage] = restarts(job), attempts_of(stage)
            FAULTS[fault](stage)
            restarted = partial(restarted_since, job, before)
            wait_for(restarted, f"the restart after {fault}", PATIENCE_SECONDS)
            seconds = time.monotonic() - clock
            told.append(f"{fault} in {stage.name}, {at_step} steps after its start: requeued after {seconds:.0f} s")
            print(f"  {len(told)}. {told[-1]}", flush=True)
    slow_down(run)
    wait_done(run, stages[-1].name)
    return [*told, *[f"{stage.name} {story(stage)}" for stage in stages]]


def restarted_since(job: str, before: int) -> bool:
    return restarts(job) > before


def strikes(stage: Path, at_step: int, struck: int) -> bool:
    """Whether an attempt after `struck` has made so many steps; with none asked for, whether the job's ranks exist."""
    try:
        job = job_of(stage)
        begun = at_step == 0 or (attempts_of(stage) > struck and steps_taken(stage) >= at_step)
        return begun and all(rank_pid(job, rank) for rank in (0, 1))
    except (LookupError, StopIteration, subprocess.CalledProcessError):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--settings", nargs="+", type=int, choices=range(4), default=list(range(4)))
    parser.add_argument("--storm", type=int, metavar="COUNT", help="this instead, under the first of the settings")
    parser.add_argument("--seed", type=int, default=0, help="of the storm")
    parser.add_argument("--directory", type=Path, help="where to work; it stays, and its reference is used again")
    given = parser.parse_args()
    failed = 0

    def work(recipe: Path, run: Path, fault: str) -> list[str]:
        if fault == "storm":
            return storm(recipe, run, given.storm, given.seed, given.only)
        return one(recipe, run, given.stages, fault)

    with tempfile.TemporaryDirectory(prefix="fcmae-matrix-") as folder:
        base = given.directory.resolve() if given.directory else Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        kept = STAGES[: STAGES.index(given.stages[-1]) + 1]
        # A fault takes a moment to find its victim, in which a quick machine makes many steps.
        recipe = long_recipe(base, kept, epochs=60 if (given.storm or 0) > 8 else 20)
        reference = base / "reference"
        fcmae("run", recipe, "--out", reference, "--nproc", 2).check_returncode()
        for number in given.settings:
            grace, user = PREEMPTION[number]
            faults = [f for f in given.only if f == "preempt" or number == given.settings[0]]
            if given.storm is not None:
                faults = ["storm"] if number == given.settings[0] else []
            with devcluster(base / f"slurm{number}", grace, user):
                for fault in faults:
                    run = base / f"{fault}-{number}"
                    try:
                        told = work(recipe, run, fault)
                        verdict = "equal" if digests(run, kept) == digests(reference, kept) else "DIFFERENT"
                    except (TimeoutError, RuntimeError, LookupError, UserError) as error:
                        told = [str(error), *[p.read_text()[-3000:] for p in run.glob("*/slurm/*_0_log.out")]]
                        verdict = "FAILED"
                    failed += verdict != "equal"
                    print(f"{fault} (GraceTime {grace}, user signal {user}): {verdict}", *told, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
