"""Faults at random times of a chain on a real, private Slurm, and the record of what they cost:

    python -m tests.chaos.timed_storm OUT.json [--seed S] [--mean-seconds 60]

All steps take half a second, so that the machine's load does not decide. Each start of a job is struck by one of FAULTS
after an exponentially distributed time, unless it is done before. OUT.json is what `fcmae times --json` prints about
the run; `fcmae simulate --replay OUT.json` compares it with a simulation.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from cluster.show.restart_times import restart_times_json
from cluster.site import load_site
from tests.chaos.slurm_matrix import long_recipe, strikes, submit
from tests.slurm.devcluster import FAULTS as ALL_FAULTS
from tests.slurm.devcluster import attempts_of, devcluster, is_done, job_of, wait_for
from tests.slurm.slow_stages import slow_down

FAULTS = ("kill_rank_0", "kill_rank_1", "kill_other_node", "preempt", "interrupt")
STAGES = ("pretrain",)
STEP_SECONDS = 0.5
PATIENCE_SECONDS = 900


def storm(folder: Path, draw: random.Random, mean_seconds: float) -> Path:
    """Run a chain under faults to its end; returns its directory."""
    run, site = folder / "run", folder / "site.yaml"
    recipe = long_recipe(folder, STAGES, epochs=40)
    patient = {"attempts_without_progress": 20}
    site.write_text(yaml.safe_dump({**load_site("devcluster").model_dump(mode="json"), **patient}))
    slow_down(run, STEP_SECONDS, **dict.fromkeys(STAGES, 0))
    submit(recipe, run, site)
    for stage in (run / name for name in STAGES):
        struck = 0
        while not is_done(stage):
            fault, seconds = draw.choice(FAULTS), draw.expovariate(1 / mean_seconds)
            running = lambda stage=stage, struck=struck: is_done(stage) or strikes(stage, 0, struck)  # noqa: E731
            wait_for(running, f"the next start of {stage.name}", PATIENCE_SECONDS)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not is_done(stage):
                time.sleep(0.1)
            if is_done(stage):
                break
            try:
                job, before = job_of(stage), attempts_of(stage)
                ALL_FAULTS[fault](stage)
            except (LookupError, StopIteration, subprocess.CalledProcessError):
                continue  # it ended in this moment
            print(f"  {fault} in {stage.name} after {seconds:.0f} s", flush=True)
            again = lambda stage=stage, before=before: is_done(stage) or attempts_of(stage) > before  # noqa: E731
            wait_for(again, f"the restart of job {job}", PATIENCE_SECONDS)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-seconds", type=float, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fcmae-storm-") as name, devcluster(Path(name) / "slurm", 30, 1):
        run = storm(Path(name), random.Random(given.seed), given.mean_seconds)
        given.out.write_text(restart_times_json([run / stage for stage in STAGES]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
