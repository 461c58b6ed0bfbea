"""A run describes its code and machine: tested with real repositories and this machine."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.slurm.code_snapshot import take_code_snapshot
from pipeline.stage.environment import SNAPSHOT, describe_commit, describe_machine, describe_software


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    """Ignore the user's git settings, which may sign commits or run hooks."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True).stdout


def test_the_commit_and_what_differs_from_it(tmp_path):
    assert describe_commit(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert describe_commit(tmp_path) == {}  # nothing is committed yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    sha = git(tmp_path, "rev-parse", "HEAD").strip()
    assert describe_commit(tmp_path) == {"sha": sha, "changed_files": 0}
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "b.py").write_text("new")
    assert describe_commit(tmp_path) == {"sha": sha, "changed_files": 2}
    inner = tmp_path / "site-packages"
    inner.mkdir()
    assert describe_commit(inner) == {}  # another project's checkout around an installed package


def test_a_copy_of_the_code_remembers_its_commit(tmp_path):
    folder = take_code_snapshot(tmp_path)
    assert json.loads((folder / SNAPSHOT).read_text())["packages"] == describe_software()["packages"]
    assert describe_commit(folder) == json.loads((folder / SNAPSHOT).read_text())["commit"]
    assert take_code_snapshot(tmp_path) == folder


def test_software_and_machine_are_plain_json():
    found = json.loads(json.dumps({**describe_software(), **describe_machine()}))
    assert found["interpreter"] == sys.executable
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 0
