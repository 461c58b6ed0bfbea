"""Two machines' clocks are an hour apart: numbers of attempts, jobs and restarts decide, so nothing changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.clocks import clock_library
from tests.support import make_tiny_run

PROGRAM = Path(__file__).with_name("starts_with_clocks.py")
MOMENTS = {"claim": [0], "stop": [1], "death before the claim": [2], "next claim": [3], "end": [4], "one host": [0, 1]}


def test_decisions_do_not_depend_on_clocks(fake_slurm, tmp_path):
    run = make_tiny_run(tmp_path, ["stages.intermediate=null", "stages.finetune=null"])
    (run / "site.yaml").write_text("nodes: 1\n")
    fake_slurm.answer("scontrol", "")
    fake_slurm.answer("squeue", "")
    shifts = [[0] * 5]
    for moments in MOMENTS.values():
        shifts += [[hour if moment in moments else 0 for moment in range(5)] for hour in (3600, -3600)]
    environment = {**os.environ, "LD_PRELOAD": str(clock_library(tmp_path)), "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(
        [sys.executable, PROGRAM, run, json.dumps(shifts)], env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line.removeprefix("RESULT ") for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(shifts), ran.stderr
    assert dict.fromkeys(lines) == {lines[0]: None}
    codes, history, state, reason = json.loads(lines[0])
    assert codes == [0, 0, 2, 1]
    assert history == [
        ["submitted", 0, None],
        ["requeued", 1, "stopped by SIGUSR2"],
        ["requeued", 1, "the ranks ended with exit code 70 and recorded no reason"],
        ["stopped", 2, "the data are damaged"],
    ]
    assert (state, reason) == ("failed", "the data are damaged")
