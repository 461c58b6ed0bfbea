"""How the ranks of a job find each other, whatever their host names resolve to."""

import os

import pytest

from cluster.slurm import rendezvous
from cluster.slurm.rendezvous import export_rank_environment, interface_towards


def test_a_rank_finds_its_place_where_host_names_do_not_resolve(start_rank):
    start_rank("node4.invalid", "127.0.0.1", {})
    assert export_rank_environment() == 3
    found = {n: os.environ[n] for n in ("MASTER_ADDR", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert found == {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_towards("127.0.0.1") == "lo"
    first = os.environ["MASTER_PORT"]
    os.environ["SLURM_RESTART_COUNT"] = "1"
    export_rank_environment()
    assert os.environ["MASTER_PORT"] != first


REAL = {"node3": "192.0.2.3", "node4": "192.0.2.4"}


@pytest.mark.parametrize(
    ("own", "launcher", "hosts", "address", "target"),
    [
        # Debian's default: a node's own name is 127.0.1.1 in its /etc/hosts, and the others' come from DNS.
        ("node3", "127.0.0.1", {**REAL, "node3": "127.0.1.1"}, "node3", "node4"),
        ("node3", "192.0.2.3", {**REAL, "node3": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        ("node4", "192.0.2.3", {**REAL, "node4": "127.0.1.1"}, "node3", "node3"),
        # The same, and DNS does not know them.
        ("node3", "192.0.2.3", {"node3": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        ("node4", "192.0.2.3", {"node4": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        # An /etc/hosts that was copied from the first node.
        ("node4", "192.0.2.3", {"node3": "127.0.1.1", "node4": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        # Names that resolve to the address that others reach are left alone.
        ("node3", "192.0.2.3", REAL, "node3", None),
        # All nodes are one machine, with and without namespaces.
        ("node3", "127.0.0.1", {"node3": "127.0.1.3", "node4": "127.0.1.4"}, "node3", None),
        ("laptop", "127.0.0.1", {"laptop": "127.0.1.1"}, "127.0.0.1", None),
    ],
)
def test_a_rank_listens_where_other_nodes_reach_it(start_rank, monkeypatch, own, launcher, hosts, address, target):
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: f"towards {host}")
    start_rank(own, launcher, hosts)
    export_rank_environment()
    assert os.environ["MASTER_ADDR"] == address
    assert (
        os.environ.get("GLOO_SOCKET_IFNAME") == os.environ.get("NCCL_SOCKET_IFNAME") == (target and f"towards {target}")
    )


def test_the_ranks_of_one_node_meet_on_its_loopback(start_rank, monkeypatch):
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: pytest.fail(f"asked how to reach {host}"))
    start_rank("node3", "192.0.2.3", {"node3": "127.0.1.1"}, "node3", 1)
    export_rank_environment()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
