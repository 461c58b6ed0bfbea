"""A study in real processes: stopped, continued, shared by two commands, and its table."""

import json
import signal
import statistics
import time
from pathlib import Path

import pytest
import yaml

from tests.processes import start_fcmae
from tests.support import fcmae, wait_for_step, weights_sha256, write_tiny_recipe

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
    table = fcmae("study", "table", out, "--markdown").stdout.split("\n\n")[0].splitlines()
    for line, (arm, values) in zip(table[2:], found.items(), strict=True):
        assert f"| {arm} | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} | 2/2 |" in line
    assert first == json.loads((out / "mixed" / "seed-0" / "intermediate" / "result.json").read_text())
    other_seed = (out / "mixed" / "seed-1" / "intermediate" / "result.json").read_text()
    assert first["weights_sha256"] not in other_seed


def test_a_stage_whose_owner_was_killed_is_resumed_for_another_arm(tmp_path):
    shorter = {"epochs": 1, "warmup_epochs": 0.2}
    study = {
        "name": "mixing",
        "about": "Does mixing help?",
        "recipe": str(write_tiny_recipe(tmp_path)),
        "change": {"stages.intermediate": None, "stages.finetune.schedule": shorter},
        "arms": {"mixed": {}, "plain": {"change": {"stages.finetune.objective.mixup": 0.0}}},
    }
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    command = ["study", "run", str(path), "--out"]
    owner = start_fcmae(*command, str(out), "arms.plain=null", FAULTS=json.dumps({"hold": {"pretrain": 7}}))
    wait_for_step(out / "mixed" / "seed-0" / "pretrain", 6)
    beside = start_fcmae(*command, str(out), "arms.mixed=null")  # waits for the owner
    deadline = time.monotonic() + 240
    while not (out / "plain" / "seed-0" / "pretrain").is_symlink():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    assert beside.poll() is None
    owner.kill()
    owner.wait(240)
    assert beside.wait(240) == 0
    pretrain = out / "mixed" / "seed-0" / "pretrain"
    attempts = [json.loads(line) for line in (pretrain / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2
    assert (out / "plain" / "seed-0" / "finetune" / "DONE").exists()
    assert not (out / "mixed" / "seed-0" / "finetune" / "DONE").exists()
    assert fcmae(*command, out).returncode == 0
    undisturbed = tmp_path / "elsewhere" / "out"
    assert fcmae(*command, undisturbed).returncode == 0
    for arm, stage in (("mixed", "pretrain"), ("mixed", "finetune"), ("plain", "finetune")):
        run = Path(arm) / "seed-0" / stage
        assert weights_sha256(out / run) == weights_sha256(undisturbed / run), "the same bits as without the kill"
