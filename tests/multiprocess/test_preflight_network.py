"""The network check between real gloo processes, each one a node."""

import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from cluster.local import reserve_port
from cluster.preflight import Expectations, PreflightSettings
from cluster.preflight.bad_nodes import check_rank
from cluster.preflight.network import check_network
from pipeline.stage.outcome import OutcomeKind, SrunCode
from tests.processes import PROCESSES
from tests.ranks import in_processes, rank_environment


def findings(settings: dict[str, float], present: Barrier) -> list[Any]:
    present.wait(400)  # so that no rank's patience with the absent ones passes while another one is still started
    return check_network(PreflightSettings(**settings), tflops=1.0, hosts=["n1", "n2", "n3"])


def start(ranks: tuple[int, ...], **settings: float) -> list[list[Any]]:
    """The findings of each of `ranks` out of three."""
    with reserve_port() as meeting:
        port = meeting.getsockname()[1] - 1  # the check meets at the port after MASTER_PORT
        nodes = [
            {**rank_environment(rank, 3, port), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank + 1}"} for rank in ranks
        ]
        return in_processes(nodes, findings, settings, PROCESSES.Barrier(len(ranks)))


def test_a_network_that_is_slow_everywhere_blames_no_node():
    first, *others = start((0, 1, 2), allreduce_floor_gb_per_second=1e6)
    (found,) = first
    assert (found.check, found.level) == ("network", "warning")
    assert "all-reduce of 3 ranks on 3 nodes" in found.detail
    assert "1e+06 expected" in found.detail
    assert 0.001 < found.value < 1000
    assert [other[0].value for other in others] == [found.value] * 2, "all ranks know the same"


@pytest.mark.parametrize(("present", "absent"), [((0, 1), "n3"), ((2,), "n1")])
def test_a_rank_that_never_comes_is_named_with_its_node(present, absent):
    for findings in start(present, join_timeout_seconds=5):
        assert [(f.level, f.node) for f in findings] == [("bad node", absent)]


def test_ranks_that_see_one_gpu_are_the_fault_of_their_node_alone():
    with reserve_port() as meeting:
        port = meeting.getsockname()[1] - 1
        nodes = [{**rank_environment(rank, 3, port), "SLURMD_NODENAME": f"n{min(rank, 1) + 1}"} for rank in range(3)]
        for findings in in_processes(nodes, on_one_gpu):
            assert [(f.level, f.node, f.detail[:16]) for f in findings] == [("bad node", "n2", "ranks 1, 2 see o")]


def on_one_gpu() -> list[Any]:
    return check_network(PreflightSettings(), gpu="aaaa")


def check_on(stage: Path, environment: dict[str, str], needed: float) -> None:
    os.environ.update(environment)
    settings = PreflightSettings(
        disk_gib=0, host_memory_gib=0, stray_seconds=0, matrix_floor_tflops=needed, join_timeout_seconds=10_000
    )  # a rank that waited for the bad one would be alive when the test stops waiting for it
    outcome = check_rank(Expectations(stage, settings=settings))
    os._exit((outcome.kind if outcome else OutcomeKind.DONE).srun_code)


@pytest.mark.parametrize("sick", [0, 1])
def test_all_ranks_leave_with_the_one_that_finds_its_node_bad(tmp_path, sick):
    with reserve_port() as meeting:
        port = meeting.getsockname()[1] - 1
        ranks = [
            PROCESSES.Process(target=check_on, args=(tmp_path, {**rank_environment(rank, 2, port), "SLURM_JOB_ID": "7",
                              "SLURM_RESTART_COUNT": "0"}, 1e6 * (rank == sick)))
            for rank in range(2)
        ]  # fmt: skip
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(400)
        assert [rank.exitcode for rank in ranks] == [SrunCode.BAD_NODE] * 2
