"""The guard of a rank, alone in its world, and the notes that it leaves."""

import pytest

from cluster.preflight import Expectations, PreflightSettings
from cluster.preflight.bad_nodes import bad_nodes, check_rank
from pipeline.stage.outcome import OutcomeKind


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
