"""What a rank of a job does before it trains."""

import pytest

from cluster.preflight import bad_nodes
from cluster.site import Site, store_site
from cluster.slurm.job_history import slurm_directory
from cluster.slurm.rendezvous import export_rank_environment
from cluster.slurm.worker import preflight_outcome, remove_torn_files, scratch_on_node
from pipeline.errors import LaunchError
from tests.support import make_tiny_run


def test_a_rank_expects_the_gpus_of_the_site_that_its_job_was_submitted_to(tmp_path, monkeypatch, start_rank):
    """Or one that is started again would look for the GPUs of another cluster, and find every node bad."""
    run = make_tiny_run(tmp_path)
    store_site(Site(gpus_per_node=8), slurm_directory(run / "pretrain"))
    store_site(Site(gpus_per_node=4), run)  # submitted to later, for another stage
    start_rank("node4.invalid", "127.0.0.1", {})
    export_rank_environment()
    monkeypatch.setattr(bad_nodes, "check_rank", lambda expected, hosts: (expected.devices, hosts))
    assert preflight_outcome(run / "pretrain") == (8, ["node3", "node3", "node4", "node4"])


def test_a_scratch_that_the_job_does_not_know_is_refused(monkeypatch):
    """Else data would be staged to a folder called $TMPDIR in the stage directory, on the shared file system."""
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    assert scratch_on_node("/scratch/$USER") == "/scratch/me"
    assert scratch_on_node("~/scratch") == "/home/me/scratch"
    for odd in ("$SLURM_TMPDIR", "${SLURM_TMPDIR}/x", "/scratch/$SLURM_TMPDIR", "scratch"):
        with pytest.raises(LaunchError, match=r"local_scratch .* is .* no absolute path; set its"):
            scratch_on_node(odd)


def test_torn_pickles_are_removed_and_nothing_else(tmp_path):
    for name in ("5_0_result.pkl.save_tmp", "5_submitted.pkl.save_tmp", "5_submitted.pkl"):
        (tmp_path / name).touch()
    remove_torn_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["5_submitted.pkl"]
