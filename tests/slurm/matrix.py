"""Every fault in every stage of a chain on a real Slurm, and the bits at the end:

    python -m tests.slurm.matrix [--only FAULT ...] [--stages STAGE ...] [--settings N ...]

Each fault has a chain of its own, which ends with the last of the stages given, and strikes once in each of them; the
weights are compared with those of `fcmae run` on as many ranks. Preemption is tried under all four GraceTime and
user-signal settings, everything else under the first. Exit code 0 if all weights are equal.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.tracking import journal
from tests.slurm.devcluster import FAULTS, PREEMPTION, devcluster, strike, wait_for
from tests.support import fcmae, write_tiny_recipe

STAGES = ("pretrain", "intermediate", "finetune")
SHARED = (
    "defaults.engine.threads=1", "defaults.tracking.log_every_steps=1", "defaults.checkpoint.every_steps=20",
    "defaults.evaluation.every_epochs=10",
)  # fmt: skip


def long_recipe(directory: Path, stages: Sequence[str] = STAGES) -> Path:
    """The tiny chain's first stages, 120 steps each: long enough to be struck in the middle."""
    epochs = [f"stages.{stage}" + (".schedule.epochs=20" if stage in stages else "=null") for stage in STAGES]
    return write_tiny_recipe(directory, [*SHARED, *epochs])


def digests(run: Path, stages: Sequence[str] = STAGES) -> list[str]:
    return [json.loads((run / stage / "DONE").read_text())["weights_sha256"] for stage in stages]


def submit(recipe: Path, run: Path) -> None:
    answer = fcmae("submit", recipe, "--site", "devcluster", "--out", run)
    if answer.returncode:
        raise RuntimeError(answer.stderr)


def wait_done(run: Path, last: str = STAGES[-1]) -> None:
    wait_for((run / last / "DONE").exists, "the chain's end", 300)


def story(stage: Path) -> str:
    """Starts and ends of a stage's attempts, by step."""
    ends = sorted((stage / "attempts").glob("*.outcome.json"))
    said = [f"{json.loads(p.read_text())['kind']}@{json.loads(p.read_text())['step']}" for p in ends]
    starts = [str(e["step"]) for e in journal.read(stage / "journal.jsonl") if e["kind"] == "attempt"]
    return f"starts at {','.join(starts)}; ends {' '.join(said)}"


def one(recipe: Path, run: Path, stages: list[str], fault: str) -> list[str]:
    """A chain that suffers the fault in each of the stages; a line about each."""
    submit(recipe, run)
    told = []
    for directory in (run / stage for stage in stages):
        told.append(f"{directory.name}: next step after {strike(directory, FAULTS[fault]):.0f} s")
    wait_done(run, stages[-1])
    return [f"{line}; {story(run / stage)}" for line, stage in zip(told, stages, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--settings", nargs="+", type=int, choices=range(4), default=list(range(4)))
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fcmae-matrix-") as folder:
        base = Path(folder)
        kept = STAGES[: STAGES.index(given.stages[-1]) + 1]
        recipe = long_recipe(base, kept)
        reference = base / "reference"
        fcmae("run", recipe, "--out", reference, "--nproc", 2).check_returncode()
        for number in given.settings:
            grace, user = PREEMPTION[number]
            faults = [f for f in given.only if f == "preempt" or number == given.settings[0]]
            with devcluster(base / f"slurm{number}", grace, user):
                for fault in faults:
                    run = base / f"{fault}-{number}"
                    try:
                        told = one(recipe, run, given.stages, fault)
                        verdict = "equal" if digests(run, kept) == digests(reference, kept) else "DIFFERENT"
                    except (TimeoutError, RuntimeError, LookupError) as error:
                        told = [str(error), *[p.read_text()[-3000:] for p in run.glob("*/slurm/*_0_log.out")]]
                        verdict = "FAILED"
                    failed += verdict != "equal"
                    print(f"{fault} (GraceTime {grace}, user signal {user}): {verdict}", *told, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
