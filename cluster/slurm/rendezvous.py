"""How the ranks of a Slurm job find each other."""

import os
import socket
import zlib
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


def export_rank_environment() -> int:
    """Set what `run_stage` reads from what srun has set; the rank."""
    import submitit

    hosts, launcher = submitit.JobEnvironment().hostnames, os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    host, own = hosts[0], socket.gethostname()
    leads = {name: _leads(name) for name in {own, launcher, *hosts[:2]}}
    # Names of nodes need not resolve; the batch script, and so srun, runs on the first node.
    if leads[host] == "nowhere" or (leads[host] == "back" and leads[launcher] == "out"):
        host = launcher or host
    # By which way are the other nodes? To itself the first one has none, but to the second.
    way = next((name for name in (host, *hosts[1:2]) if leads[name] == "out"), host)
    # gloo and NCCL listen where their own name leads; without one, or with Debian's 127.0.1.1, gloo would take the
    # loopback. That is right for one node, and where the others' names lead there too: tools/devcluster.
    unheard = leads[own] == "nowhere" or (leads[own] == "back" and leads[way] == "out" and len(hosts) > 1)
    if unheard and leads[way] != "nowhere" and (interface := interface_towards(way)):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    # Below the ports that Linux gives to outgoing connections, and another one after each requeue: what is left of an
    # attempt on a node that was out of reach cannot join the next one.
    run_of_job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_NNODES"])),
        MASTER_ADDR=host,
        MASTER_PORT=str(10000 + zlib.crc32(run_of_job.encode()) % 22000),
    )
    return int(os.environ["RANK"])


def _leads(name: str) -> Literal["nowhere", "back", "out"]:
    """Where a name leads from this machine: back is the loopback. Of several addresses gloo takes the first."""
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return "nowhere"
    return "back" if ip_address(address).is_loopback else "out"


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches a host."""
    import psutil

    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in (a.address for a in addresses)), None)
