"""The network check between real gloo processes, each one a node."""

import json
import os
import subprocess
import sys

import pytest

from cluster.local import reserve_port

RANK = """
import json, sys
from dataclasses import asdict
from cluster.preflight import PreflightSettings
from cluster.preflight.network import check_network
settings = PreflightSettings.model_validate_json(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()  # all at once, for how long they wait for one another is what is tested
print(json.dumps([asdict(f) for f in check_network(settings, tflops=1.0, hosts=["n1", "n2", "n3"])]))
"""


def start(ranks: tuple[int, ...], **settings: float) -> list[list[dict]]:
    """The findings of each of `ranks` out of three."""
    with reserve_port() as meeting:  # the check meets at the port after MASTER_PORT
        return start_at(meeting.getsockname()[1] - 1, ranks, settings)


def start_at(port: int, ranks: tuple[int, ...], settings: dict[str, float]) -> list[list[dict]]:
    place = {"WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(settings)],
            env={
                **os.environ, **{name: str(value) for name, value in place.items()},
                "RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}", "GLOO_SOCKET_IFNAME": "lo",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]  # fmt: skip
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * len(ranks)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [json.loads(process.communicate(timeout=400)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_network_that_is_slow_everywhere_blames_no_node():
    first, *others = start((0, 1, 2), allreduce_floor_gb_per_second=1e6)
    (found,) = first
    assert (found["check"], found["level"]) == ("network", "warning")
    assert "all-reduce of 3 ranks on 3 nodes" in found["detail"]
    assert "1e+06 expected" in found["detail"]
    assert 0.001 < found["value"] < 1000
    assert [other[0]["value"] for other in others] == [found["value"]] * 2, "all ranks know the same"


@pytest.mark.parametrize(("present", "absent"), [((0, 1), "n3"), ((2,), "n1")])
def test_a_rank_that_never_comes_is_named_with_its_node(present, absent):
    for findings in start(present, join_timeout_seconds=5):
        assert [(f["level"], f["node"]) for f in findings] == [("bad node", absent)]
