"""A study as jobs: each arm a chain of its own, nothing queued twice, one table at the end."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.slurm.submit import live_jobs
from tests.slurm.devcluster import wait_for
from tests.support import fcmae, write_tiny_recipe


@pytest.mark.slow
def test_a_submitted_study_ends_in_a_table(slurm: None, tmp_path: Path) -> None:
    study = {
        "name": "mixing",
        "about": "Does mixing help?",
        "recipe": str(write_tiny_recipe(tmp_path)),
        "change": {
            "stages.pretrain": None,
            "stages.finetune": None,
            "stages.intermediate.schedule.epochs": 1,
            "stages.intermediate.data.timeout_seconds": 600,  # numba compiles anew in every new place of the code
        },
        "arms": {"mixed": {}, "plain": {"change": {"stages.intermediate.objective.mixup": 0.0}}},
    }
    path, out, site = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "site.yaml"
    site.write_text("partition: low\nnodes: 1\ntime_limit_minutes: 30\nenvironment: {OMP_NUM_THREADS: '1'}\n")
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    runs = [out / arm / "seed-0" for arm in study["arms"]]
    try:
        first = fcmae("study", "submit", path, "--site", site, "--out", out)
        assert first.returncode == 0, first.stderr
        assert [line.split(" ")[:3] for line in first.stdout.splitlines()] == [
            ["mixed", "0", "intermediate:"],
            ["plain", "0", "intermediate:"],
        ]
        again = fcmae("study", "submit", path, "--site", site, "--out", out)
        assert (again.returncode, again.stdout) == (0, "")
        wait_for(lambda: all((run / "intermediate" / "DONE").exists() for run in runs), "both arms", 500)
        assert [path.name for path in out.glob("code/*")] == [path.name for path in out.rglob("code/*")]
    finally:
        for run in runs:
            fcmae("cancel", run)
    table = json.loads(fcmae("study", "table", out, "--json").stdout)
    for arm, run in zip(table["arms"], runs, strict=True):
        assert arm["results"] == [json.loads((run / "intermediate" / "result.json").read_text())["metrics"]["top1"]]


@pytest.mark.slow
def test_twelve_arms_share_the_jobs_of_equal_stages(slurm: None, tmp_path: Path) -> None:
    arms = {f"mixup-{i}": {"change": {"stages.finetune.objective.mixup": i / 10}} for i in range(1, 10)}
    for i in (1, 2):
        hidden = {"stages.pretrain.objective.mask_ratio": 0.3, "stages.finetune.objective.mixup": i / 10}
        arms[f"hide-less-{i}"] = {"change": hidden}
    arms["supervised"] = {"change": {"stages.pretrain": None}}
    study = {
        "name": "twelve",
        "about": "What is mixing worth after pre-training?",
        "recipe": str(write_tiny_recipe(tmp_path)),
        "change": {
            "stages.intermediate": None,
            "defaults.schedule": {"epochs": 1, "warmup_epochs": 0.2},
            "stages.pretrain.schedule": {"epochs": 1, "warmup_epochs": 0.2},
            "stages.finetune.schedule": {"epochs": 1, "warmup_epochs": 0.2},
            "defaults.data.timeout_seconds": 600,
        },
        "arms": arms,
    }
    path, out, site = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "site.yaml"
    site.write_text("partition: low\nnodes: 1\ntime_limit_minutes: 30\nenvironment: {OMP_NUM_THREADS: '1'}\n")
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    plan = json.loads(fcmae("study", "show", path, "--json").stdout)
    assert (len(plan["runs"]), plan["stages"], plan["trained"]) == (12, 23, 14)
    dry = fcmae("study", "submit", path, "--site", site, "--out", out, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2/12 mixup-2, seed 0: pretrain of mixup-1 > finetune" in dry.stdout
    assert not out.exists()
    runs = [out / arm / "seed-0" for arm in arms]
    try:
        done = fcmae("study", "submit", path, "--site", site, "--out", out)
        assert done.returncode == 0, done.stderr
        lines = [line.split(" ") for line in done.stdout.splitlines() if ": job " in line]
        jobs = {(arm, stage.strip(":")): job.strip(",") for arm, _, stage, _, job, *_ in lines}
        after = {(arm, stage.strip(":")): rest[-1] for arm, _, stage, _, _, *rest in lines if rest}
        assert len(jobs) == 14, "each equal stage has one job"
        assert {after[arm, "finetune"] for arm in arms if arm.startswith("mixup")} == {jobs["mixup-1", "pretrain"]}
        assert after["hide-less-2", "finetune"] == jobs["hide-less-1", "pretrain"]
        again = fcmae("study", "submit", path, "--site", site, "--out", out)
        assert (again.returncode, again.stdout) == (0, "")
        # The owner's own run is cancelled: its pre-training goes on elsewhere only when another arm is submitted anew.
        assert "cancelled" in fcmae("cancel", runs[0]).stdout
        assert fcmae("study", "submit", path, "--site", site, "--out", out, "arms.mixup-1=null").returncode == 0
        rest = runs[1:]
        wait_for(lambda: all((run / "finetune" / "DONE").exists() for run in rest), "eleven arms", 600)
    finally:
        for run in runs:
            fcmae("cancel", run)
    pretrained = [json.loads((run / "pretrain" / "DONE").read_text())["weights_sha256"] for run in runs[:11]]
    assert len(set(pretrained[:9])) == len(set(pretrained[9:])) == 1
    assert pretrained[0] != pretrained[9]
    for run in runs[1:11]:
        events = [json.loads(line) for line in (run / "finetune" / "journal.jsonl").read_text().splitlines()]
        received = next(event for event in events if event["kind"] == "handoff")
        assert received["sha256"] == json.loads((run / "pretrain" / "DONE").read_text())["weights_sha256"]
    attempts = [json.loads(line) for line in (runs[0] / "pretrain" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["outcome"]["kind"] for attempt in attempts].count("done") == 1


@pytest.mark.slow
def test_a_rung_of_a_ladder_starts_only_if_the_one_before_is_in_its_band(slurm: None, tmp_path: Path) -> None:
    ratio, most = "stages.pretrain.objective.mask_ratio", "stages.pretrain.gate"
    study = {
        "name": "ladder",
        "about": "Is it worth going on?",
        "recipe": str(write_tiny_recipe(tmp_path)),
        "change": {
            "stages.intermediate": None,
            "stages.finetune": None,
            "stages.pretrain.objective.normalize_target": False,  # so few steps are not better than grey cells
            "stages.pretrain.data.timeout_seconds": 600,
        },
        "ladder": True,
        "arms": {
            "first": {"change": {most: {"metric": "loss", "at_most": 100.0}}},
            "second": {"change": {ratio: 0.5, most: {"metric": "loss", "at_most": 0.0}}},
            "third": {"change": {ratio: 0.4}},
        },
    }
    path, out, site = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "site.yaml"
    site.write_text("partition: low\nnodes: 1\ntime_limit_minutes: 30\nenvironment: {OMP_NUM_THREADS: '1'}\n")
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    runs = [out / arm / "seed-0" for arm in study["arms"]]
    try:
        done = fcmae("study", "submit", path, "--site", site, "--out", out)
        lines = [line.split(" ") for line in done.stdout.splitlines() if ": job " in line]
        jobs = [line[4].strip(",") for line in lines]
        assert [line[-1] for line in lines[1:]] == jobs[:2], "each waits for the job before"
        wait_for(lambda: (runs[1] / "pretrain" / "DONE").exists(), "the second rung", 300)
        wait_for(lambda: not live_jobs(runs[2], ["pretrain"]), "Slurm to cancel the third rung", 200)
        assert (runs[0] / "pretrain" / "DONE").exists()
        assert not (runs[2] / "pretrain" / "attempts").exists()
        again = fcmae("study", "submit", path, "--site", site, "--out", out)
        assert again.returncode == 77
        assert "the recipe asks for at most 0" in again.stderr
        assert not live_jobs(runs[2], ["pretrain"])
    finally:
        for run in runs:
            fcmae("cancel", run)
