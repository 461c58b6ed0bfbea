"""A study as jobs: each arm a chain of its own, nothing queued twice, one table at the end."""

import json
from pathlib import Path

import pytest
import yaml

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
