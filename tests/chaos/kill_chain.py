"""Kill a chain at a random moment of each stage, stop it once by SIGTERM, and compare it with an undisturbed run:

    python -m tests.chaos.kill_chain RECIPE OUT REFERENCE [--nproc N]

RECIPE's steps are taken from REFERENCE, a finished run of it on as many ranks. Exit code 0 if every stage's weights
have the reference's hash.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.tracking import journal
from tests.support import FCMAE


def result(stage: Path) -> dict:
    return json.loads((stage / "result.json").read_text())


def steps_done(stage: Path) -> int:
    return max((e["step"] for e in journal.read_events(stage / "journal.jsonl") if e["kind"] == "step"), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--nproc", type=int, default=2)
    given = parser.parse_args()
    stages = sorted((p.parent for p in given.reference.glob("*/result.json")), key=lambda p: p.stat().st_mtime)
    names = [stage.name for stage in stages]
    plan = [(name, "SIGKILL") for name in names]
    plan.insert(random.randint(0, len(plan)), (random.choice(names), "SIGTERM"))
    plan.sort(key=lambda item: names.index(item[0]))
    command = [*FCMAE, "run", given.recipe, "--out", str(given.out), "--nproc", str(given.nproc)]
    for name, how in plan:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        goal = random.randint(steps_done(given.out / name) + 1, result(given.reference / name)["steps"])
        while steps_done(given.out / name) < goal and process.poll() is None:
            time.sleep(0.1)
        time.sleep(random.random())
        if how == "SIGKILL":
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
        print(f"{name}: {how} at step {steps_done(given.out / name)}, exit code {process.wait()}", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    equal = True
    for name in names:
        own, reference = result(given.out / name), result(given.reference / name)
        same = own["weights_sha256"] == reference["weights_sha256"]
        equal = equal and same
        verdict = "equals" if same else "DIFFERS FROM"
        print(f"{name}: {own['weights_sha256'][:16]} {verdict} {reference['weights_sha256'][:16]}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
