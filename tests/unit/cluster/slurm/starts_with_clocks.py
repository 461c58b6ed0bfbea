"""The starts of one job on machines with other clocks: python starts_with_clocks.py RUN SHIFTS. It prints what was
decided, a line for each list of shifts, for `test_clocks`."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from cluster.show.status import StageFollower
from cluster.slurm.client import Job, JobState
from cluster.slurm.job_history import note_job_event, read_job_history
from cluster.slurm.supervisor import conclude
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind, SrunCode
from pipeline.tracking.startup import JOB_STARTED
from tests.clocks import set_clock


def start(directory: Path, restart: int, seconds: int) -> Stage:
    """Be the processes of the job's start number `restart` on a machine with a shifted clock."""
    set_clock(seconds)
    os.environ.update(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restart))
    os.environ[JOB_STARTED] = str(time.time())  # as the job script notes it
    return Stage(directory)


def decisions(directory: Path, shifts: list[int]) -> list[object]:
    """The first start claims the stage, saves and is requeued; the second dies before it claims the stage; the third
    fails for good."""
    set_clock(0)
    note_job_event(directory, "submitted", "7", committed=-1)
    stage = start(directory, 0, shifts[0])
    stage.attempts.claim(world_size=1)
    stage.attempts.record(Outcome(OutcomeKind.SAVED, "stopped by SIGUSR2", 3))
    codes = [conclude(start(directory, 0, shifts[1]), SrunCode.SAVED, "7", 9)]
    codes.append(conclude(start(directory, 1, shifts[2]), SrunCode.CRASHED, "7", 9))
    stage = start(directory, 2, shifts[3])
    codes.append(stage.attempts.claim(world_size=1))
    stage.attempts.record(Outcome(OutcomeKind.PERMANENT, "the data are damaged", 3))
    codes.append(conclude(start(directory, 2, shifts[4]), SrunCode.PERMANENT, "7", 9))
    set_clock(0)
    history = [(entry["event"], entry["attempt"], entry.get("reason")) for entry in read_job_history(directory)]
    status = StageFollower(directory).status(Job("7", JobState.FAILED, "FAILED"))
    return [codes, history, status.state, status.reason]


def main() -> None:
    run, copy = Path(sys.argv[1]), Path(sys.argv[1] + "-copy")
    for shifts in json.loads(sys.argv[2]):
        shutil.copytree(run, copy)
        said = decisions(copy / "pretrain", shifts)
        print("RESULT " + json.dumps(said).replace(str(copy), "RUN"), flush=True)
        shutil.rmtree(copy)


if __name__ == "__main__":
    main()
