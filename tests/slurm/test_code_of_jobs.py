"""Jobs on a real Slurm run the code that was submitted, or nothing; no secret of the submitting shell is written."""

import json
import os
import py_compile
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.slurm.job_history import last_submitted, read_job_history
from tests.multiprocess.test_canary import CANARY, IN_ENVIRONMENT, files_with_the_canary, watched_command_lines
from tests.slurm.devcluster import job_with, wait_for
from tests.support import fcmae, write_tiny_recipe

TWO_STAGES = ("stages.finetune=null",)


def state_of(stage: Path) -> str:
    return job_with(str(last_submitted(stage))).slurm_state


def _alter_compiled(code: Path) -> None:
    path = Path(py_compile.compile(str(code / "cluster/slurm/worker.py")))
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [(shutil.rmtree, "is gone"), (_alter_compiled, "was changed"), (None, "")],
    ids=["gone", "compiled code altered", "whole"],
)
def test_a_job_whose_code_is_gone_or_altered_fails_with_a_sentence(slurm, tmp_path, fault, words):
    """The virtual environment of the job knows a checkout, and that one is not run instead."""
    recipe, site, run = write_tiny_recipe(tmp_path), tmp_path / "held.yaml", tmp_path / "run"
    site.write_text(yaml.safe_dump({"nodes": 1, "sbatch": {"hold": True}}))
    assert fcmae("submit", recipe, "--site", site, "--out", run, *TWO_STAGES).returncode == 0
    first, second = run / "pretrain", run / "intermediate"
    try:
        (code,) = (run / "code").iterdir()
        if fault:
            fault(code)
        jobs = [str(last_submitted(stage)) for stage in (first, second)]
        subprocess.run(["scontrol", "release", ",".join(jobs)], check=True)
        ended = ("COMPLETED",) if fault is None else ("FAILED", "CANCELLED")
        wait_for(lambda: state_of(first) in ended and state_of(second) in ended, "the jobs to end", 400)
        if fault is None:
            assert (second / "DONE").exists()
            return
        sentence = f"the copy of the code in {code} {words}"
        assert sentence in (first / "slurm" / f"{jobs[0]}_0_log.out").read_text()
        assert not (first / "attempts").exists()
        assert read_job_history(first)[-1]["reason"].startswith(sentence)
        status = json.loads(fcmae("status", run, "--json").stdout)
        assert status[0]["state"] == "failed"
        assert status[0]["reason"].startswith(sentence)
        assert fcmae("resume", run, "--site", "devcluster").returncode == 0  # with a new copy
        wait_for(lambda: state_of(second) == "COMPLETED", "the resumed run", 400)
        assert (second / "DONE").exists()
    finally:
        fcmae("cancel", run)


@pytest.mark.slow
def test_no_secret_of_the_submitting_shell_is_written(slurm, tmp_path, monkeypatch):
    for name, value in IN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "run"
    tracked = [f"stages.{name}.tracking.mlflow=true" for name in ("pretrain", "intermediate")]
    with watched_command_lines() as seen:
        assert fcmae("submit", recipe, "--site", "devcluster", "--out", run, *TWO_STAGES, *tracked).returncode == 0
        wait_for(lambda: (run / "intermediate" / "DONE").exists(), "the chain", 600)
        shown = subprocess.run(["scontrol", "show", "job", "-d"], capture_output=True, text=True, check=True).stdout
        fcmae("report", run)
    assert (run / "mlflow.db").exists()
    assert (run / "report.html").exists()
    assert files_with_the_canary(tmp_path) == []
    assert seen == []
    assert CANARY not in shown
