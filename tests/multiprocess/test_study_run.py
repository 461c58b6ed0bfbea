"""A study in real processes: stopped, continued, and its table."""

import json
import signal
import statistics
import time

import pytest
import yaml

from tests.processes import start_fcmae
from tests.support import fcmae, write_tiny_recipe

pytestmark = pytest.mark.slow


def test_a_study_that_is_stopped_goes_on_and_ends_in_a_table(tmp_path):
    study = {
        "name": "mixing",
        "about": "Does mixing help?",
        "recipe": str(write_tiny_recipe(tmp_path)),
        "change": {"stages.pretrain": None, "stages.finetune": None, "stages.intermediate.schedule.epochs": 1},
        "seeds": [0, 1],
        "arms": {
            "mixed": {"published": 90.0},
            "plain": {"change": {"stages.intermediate.objective.mixup": 0.0}},
        },
    }
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    command = ["study", "run", str(path), "--out", str(out)]
    process = start_fcmae(*command, FAULTS=json.dumps({"hold": {"plain/seed-0/intermediate": 1}}))
    deadline = time.monotonic() + 240
    while not (out / "plain" / "seed-0" / "intermediate" / "attempts").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(240)
    assert process.returncode == 75
    assert not (out / "plain" / "seed-1" / "intermediate" / "DONE").exists()
    first = json.loads((out / "mixed" / "seed-0" / "intermediate" / "result.json").read_text())

    done = fcmae(*command)
    assert done.returncode == 0, done.stderr
    assert "1/4 mixed, seed 0: done before" in done.stdout
    assert "1/4 mixed, seed 0: done before\n2/4 plain, seed 0: intermediate" in done.stdout
    found = {
        arm: [
            json.loads((out / arm / f"seed-{seed}" / "intermediate" / "result.json").read_text())["metrics"]["top1"]
            for seed in (0, 1)
        ]
        for arm in ("mixed", "plain")
    }
    table = fcmae("study", "table", out, "--markdown").stdout.splitlines()
    for line, (arm, values) in zip(table[2:], found.items(), strict=True):
        assert f"| {arm} | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} | 2/2 |" in line
    assert first == json.loads((out / "mixed" / "seed-0" / "intermediate" / "result.json").read_text())
    other_seed = (out / "mixed" / "seed-1" / "intermediate" / "result.json").read_text()
    assert first["weights_sha256"] not in other_seed
