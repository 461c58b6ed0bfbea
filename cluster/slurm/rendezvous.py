"""How the ranks of a Slurm job find each other: address, port and network interface."""

import os
import socket
import zlib
from ipaddress import ip_address
from typing import Literal


def export_rank_environment() -> int:
    """Set the variables that `run_stage` reads, from those that srun has set; the rank."""
    import submitit

    hosts, launcher = submitit.JobEnvironment().hostnames, os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    master, own = hosts[0], socket.gethostname()
    reach = {name: _reach(name) for name in {own, launcher, *hosts[:2]}}
    # Node names need not resolve; the batch script, and so srun, runs on the first node.
    if reach[master] == "nothing" or (reach[master] == "loopback" and reach[launcher] == "network"):
        master = launcher or master
    # Pick a host that is reached through a real network interface; the first node must look at the second.
    target = next((name for name in (master, *hosts[1:2]) if reach[name] == "network"), master)
    # gloo and NCCL listen on the address of their own name. Without one, or with Debian's 127.0.1.1, gloo would take
    # the loopback, which is right only for one node, or where all nodes are one machine (tools/devcluster).
    unreachable = reach[own] == "nothing" or (
        reach[own] == "loopback" and reach[target] == "network" and len(hosts) > 1
    )
    if unreachable and reach[target] != "nothing" and (interface := interface_towards(target)):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    # A port below those that Linux gives to outgoing connections, and another one after each requeue, so that a process
    # left over from an attempt on an unreachable node cannot join the next attempt.
    start_of_job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_NNODES"])),
        MASTER_ADDR=master,
        MASTER_PORT=str(10000 + zlib.crc32(start_of_job.encode()) % 22000),
    )
    return int(os.environ["RANK"])


def _reach(name: str) -> Literal["nothing", "loopback", "network"]:
    """What a host name resolves to on this machine. Of several addresses gloo takes the first."""
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return "nothing"
    return "loopback" if ip_address(address).is_loopback else "network"


def interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches a host."""
    import psutil

    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in (a.address for a in addresses)), None)
