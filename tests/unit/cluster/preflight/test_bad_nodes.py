"""The guard of a rank, alone in its world, and the notes that it leaves."""

import json
import os
import time

import pytest
import torch

from cluster.preflight import Expectations, PreflightSettings
from cluster.preflight.bad_nodes import bad_nodes, blame_own_node, check_rank, every_node_is_bad
from pipeline.stage.device_errors import DeviceError, device_error
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from tests.support import make_tiny_run


@pytest.fixture(autouse=True)
def job(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n5")


def settings(**changes: float) -> PreflightSettings:
    return PreflightSettings(**{"disk_gib": 0.0, "host_memory_gib": 0.0, "stray_seconds": 0.0, **changes})


def test_a_good_node_leaves_no_note(tmp_path, capsys):
    assert check_rank(Expectations(tmp_path, settings=settings())) is None
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_bad_node_is_noted_by_slurms_name_for_the_job(tmp_path, capsys):
    outcome = check_rank(Expectations(tmp_path, settings=settings(matrix_floor_tflops=1e6)))
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert "matrix product on n5: " in outcome.reason
    assert "1e+06 needed" in capsys.readouterr().out
    assert list(bad_nodes(tmp_path, "7")) == ["n5"]
    assert bad_nodes(tmp_path, "7")["n5"].startswith("matrix product: ")
    assert bad_nodes(tmp_path, "71") == bad_nodes(tmp_path / "other", "7") == {}


def test_what_no_node_has_blames_none(tmp_path):
    outcome = check_rank(Expectations(tmp_path, settings=settings(disk_gib=1e9)))
    assert outcome.kind is OutcomeKind.PERMANENT
    assert bad_nodes(tmp_path, "7") == {}


def test_where_nothing_can_be_noted_the_table_says_so(tmp_path, capsys):
    (tmp_path / "slurm").write_text("a file where the folder should be")
    outcome = check_rank(Expectations(tmp_path, settings=settings(host_memory_gib=1e6)))
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert "not recorded: " in capsys.readouterr().out


def note(stage, start: str, *nodes: str, age_seconds: float = 0.0) -> None:
    folder = stage / "slurm" / "bad-nodes"
    folder.mkdir(parents=True, exist_ok=True)
    for rank, node in enumerate(nodes):
        path = folder / f"{start}.{rank}.json"
        path.write_text(json.dumps([{"node": node, "check": "gpu", "detail": "lost"}]))
        os.utime(path, (time.time() - age_seconds,) * 2)


@pytest.mark.parametrize(
    ("starts", "nodes", "suspect"),
    [
        ([["a"], ["b"], ["c"]], 1, True),
        ([["a"], ["b"], ["a"]], 1, True),  # a cluster of two nodes
        ([["a"], ["b"]], 1, False),  # two bad nodes that are idle attract jobs
        ([["a", "b", "c"]], 3, True),  # the first start of a larger job
        ([["a", "b"]], 3, False),
        ([["a"], ["b"], ["c"]], 2, False),  # each start had a good node, too
        ([["a"], [], ["c"], ["d"]], 1, False),  # one start found no bad node
    ],
)
def test_a_program_that_finds_every_node_bad_is_the_suspect(tmp_path, starts, nodes, suspect):
    for restart, bad in enumerate(starts):
        note(tmp_path, f"7.{restart}", *bad)
    assert every_node_is_bad(tmp_path, "7", len(starts) - 1, nodes) is suspect


def test_nodes_that_break_days_apart_are_not_the_programs_fault(tmp_path):
    for restart in range(3):
        note(tmp_path, f"7.{restart}", f"n{restart}", age_seconds=86400.0 * (3 - restart))
    assert not every_node_is_bad(tmp_path, "7", 2, 1)


# -- a GPU that fails while the stage trains

TOOLS = {
    "healthy": ("echo 'GPU-aaaa, 0, No, No'", "true"),
    "ecc": ("echo 'GPU-aaaa, 2, No, No'", "true"),
    "lost": ("echo 'Unable to determine the device handle for GPU0: GPU is lost.'; exit 15", "true"),
    "old xid": ("echo 'GPU-aaaa, 0, No, No'", "echo '[    1.000000] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, bus'"),
    "program's xid": ("echo 'GPU-aaaa, 0, No, No'", "echo '[99999999.5] NVRM: Xid (PCI:0000:3b:00): 31, pid=1, MMU'"),
    "xid": ("echo 'GPU-aaaa, 0, No, No'", "echo '[99999999.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, bus'"),
}


@pytest.mark.parametrize(
    ("code", "tools", "blamed"),
    [
        (700, "healthy", None),
        (719, "old xid", None),
        (719, "program's xid", None),
        (700, "ecc", "2 uncorrected memory errors"),
        (719, "lost", "GPU is lost"),
        (719, "xid", "Xid (PCI:0000:3b:00): 79"),
        (214, "healthy", "uncorrectable ECC error"),
    ],
)
def test_only_hardware_blames_the_node_of_a_gpu_that_failed(tmp_path, monkeypatch, code, tools, blamed):
    for name, script in zip(("nvidia-smi", "dmesg"), TOOLS[tools], strict=True):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stage = Stage(make_tiny_run(tmp_path) / "pretrain")
    stage.attempts.claim(world_size=1)
    error = torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered" if code == 214 else "CUDA error: x"
    )
    error.error_code = code
    stage.attempts.record_device_error(device_error(error))
    blame_own_node(stage.directory)
    found = bad_nodes(stage.directory, "7", 2)
    assert list(found) == (["n5"] if blamed else [])
    assert blamed is None or blamed in found["n5"]
    assert [e.hardware for e in stage.attempts.device_errors()] == [blamed is not None]


def test_an_error_of_another_attempt_blames_no_node(tmp_path):
    stage = Stage(make_tiny_run(tmp_path) / "pretrain")
    stage.attempts.claim(world_size=1)
    stage.attempts.record_device_error(DeviceError("n5", 214, "uncorrectable ECC error", hardware=True))
    stage.attempts.record(Outcome(OutcomeKind.BAD_NODE, "a GPU failed"))
    Stage(stage.directory).attempts.claim(world_size=1)
    blame_own_node(stage.directory)
    assert bad_nodes(stage.directory, "7") == {}
