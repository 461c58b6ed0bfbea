"""Check that the ranks and the network between their nodes are equally fast, after the preflight of each node.

The check uses a process group of its own, so that a slow or absent node is named before training hangs on it.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.check_results import UNKNOWN_NODE, CheckResult, Level
from cluster.preflight.gpu import slow_ranks
from cluster.preflight.settings import PreflightSettings
from pipeline.distributed.processes import shared_gpus
from pipeline.stage.device_errors import own_node

CPU_BYTES, GPU_BYTES = 4 * 2**20, 256 * 2**20


def check_network(
    settings: PreflightSettings,
    *,
    tflops: float | None = None,
    cuda: bool = False,
    hosts: Sequence[str] = (),
    gpu: str | None = None,
) -> list[CheckResult]:
    """Compare the ranks' matrix products and measure the all-reduce. Collective: one call per rank, with RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set; uses the port after MASTER_PORT.

    Args:
        tflops: this rank's matrix product, from `check_node`.
        cuda: use NCCL instead of gloo. The device must have been set.
        hosts: each rank's node as scheduled, to name the node of a rank that does not join.
        gpu: the id of this rank's GPU, which no other rank may have.

    Returns:
        The same results on every rank.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or not settings.enabled:
        return [CheckResult("network", Level.SKIPPED, "one rank" if size == 1 else "switched off by the site")]
    timeout = timedelta(seconds=settings.join_timeout_seconds)
    try:
        store = _join_store(rank, size, timeout)
    except RuntimeError as error:  # DistStoreError is a subclass
        return [_unreachable(rank, str(error).splitlines()[0], hosts)]
    try:
        missing, sharing = _meet(store, rank, size, timeout, (own_node(), gpu or f"of rank {rank}"))
    except RuntimeError:
        # Why it left is recorded by the rank that knows; its node may be sound.
        return [_unreachable(rank, "it left before all ranks had joined", [UNKNOWN_NODE])]
    if sharing:
        return [
            CheckResult("gpu", Level.BAD_NODE, f"ranks {', '.join(map(str, ranks))} see one GPU, each needs its own",
                    "look at `nvidia-smi` there", node=node)
            for node, ranks in sharing.items()
        ]  # fmt: skip
    if missing:
        detail = f"rank {{}} did not join within {settings.join_timeout_seconds:g} s"
        return [
            CheckResult("network", Level.BAD_NODE, detail.format(other), node=hosts[other] if hosts else UNKNOWN_NODE)
            for other in missing
        ]
    try:
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            return _measure(settings, tflops, cuda)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        detail = f"rank {rank}: {str(error).splitlines()[0]}"
        return [CheckResult("network", Level.BAD_NODE, detail, "see NCCL's log with NCCL_DEBUG=INFO")]


def _join_store(rank: int, size: int, timeout: timedelta) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    return dist.TCPStore(address, port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)


def _unreachable(rank: int, why: str, hosts: Sequence[str]) -> CheckResult:
    node = hosts[0] if hosts else os.environ["MASTER_ADDR"]
    return CheckResult("network", Level.BAD_NODE, f"rank {rank} cannot reach rank 0: {why}", node=node)


def _meet(
    store: dist.TCPStore, rank: int, size: int, timeout: timedelta, place: tuple[str, str]
) -> tuple[list[int], dict[str, list[int]]]:
    """Wait for all ranks. `place`: this rank's node and the id of its GPU.

    Returns:
        The ranks that did not join in time, and by node the ranks that see the same GPU, as where most GPUs are lost.
        Rank 0 decides; the same on every rank.
    """
    store.set(f"here/{rank}", json.dumps(place))
    if rank:
        store.wait(["verdict"], timeout * 2)  # rank 0 may have begun to wait later
        missing, sharing = json.loads(store.get("verdict"))
        store.set(f"informed/{rank}", "")
        return missing, sharing
    with suppress(RuntimeError):
        store.wait([f"here/{other}" for other in range(size)], timeout)
    missing, sharing = [other for other in range(size) if not store.check([f"here/{other}"])], {}
    if not missing:
        places = [tuple(json.loads(store.get(f"here/{other}"))) for other in range(size)]
        for other in shared_gpus(places):
            sharing.setdefault(places[other][0], []).append(other)
    store.set("verdict", json.dumps([missing, sharing]))
    if missing or sharing:  # the store ends with this process, so wait until the others have read it
        with suppress(RuntimeError):
            store.wait([f"informed/{other}" for other in range(1, size) if other not in missing], timeout)
    return missing, sharing


def _measure(settings: PreflightSettings, tflops: float | None, cuda: bool) -> list[CheckResult]:
    size = dist.get_world_size()
    shared: list = [None] * size
    dist.all_gather_object(shared, (own_node(), int(os.environ.get("LOCAL_RANK", 0)), tflops))
    nodes = [node for node, _, _ in shared]
    results = []
    if cuda and all(product is not None for _, _, product in shared):
        results += _compare([product for _, _, product in shared], nodes, settings.matrix_fraction)
    rate, floor = allreduce_gb_per_second(cuda), settings.allreduce_floor_gb_per_second
    detail = f"all-reduce of {size} ranks on {len(set(nodes))} nodes: {rate:.3g} GB/s"
    if rate >= floor:
        return [*results, CheckResult("network", Level.OK, detail, value=rate)]
    leaders = [rank for rank, (_, local, _) in enumerate(shared) if local == 0]
    slow = slow_places(pair_gb_per_second(leaders, cuda), floor)
    # If most nodes are slow, none of them is to blame, and other nodes need not be better.
    if not slow or len(slow) * 2 >= len(leaders):
        return [*results, CheckResult("network", Level.WARNING, f"{detail}, {floor:g} expected", "ask the site", rate)]
    return results + [
        CheckResult("network", Level.BAD_NODE, f"{detail}, {floor:g} needed; the links of {nodes[leaders[i]]} are slow",
                "see its network card and cable", rate, nodes[leaders[i]])
        for i in slow
    ]  # fmt: skip


def _compare(products: list[float], nodes: list[str], fraction: float) -> list[CheckResult]:
    slow = slow_ranks(products, fraction)
    if not slow:
        return [CheckResult("equal GPUs", Level.OK, f"{min(products):.3g} to {max(products):.3g} TFLOP/s")]
    return [
        CheckResult("equal GPUs", Level.BAD_NODE,
                f"rank {rank}: {products[rank]:.3g} TFLOP/s, where the others have {median:.3g}",
                "see its clocks and temperature", products[rank], nodes[rank])
        for rank, median in slow.items()
    ]  # fmt: skip


def allreduce_gb_per_second(cuda: bool) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in 10^9 bytes/s: the load of the slowest link, independent of the
    number n of ranks (2 (n-1)/n times the bytes; nccl-tests, doc/PERFORMANCE.md). The same on every rank."""
    tensor = torch.ones((GPU_BYTES if cuda else CPU_BYTES) // 4, device="cuda" if cuda else "cpu")
    repeats = 5

    def run() -> None:
        for _ in range(repeats):
            dist.all_reduce(tensor)

    seconds = torch.tensor(_timed(run, cuda) / repeats, device=tensor.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    size = dist.get_world_size()
    return 2 * (size - 1) / size * tensor.nbytes / float(seconds) / 1e9


def pair_gb_per_second(leaders: list[int], cuda: bool) -> list[float]:
    """Bandwidth in 10^9 bytes/s from each leader to the next one in the ring, one pair after the other. The same on
    every rank."""
    tensor = torch.ones((GPU_BYTES if cuda else CPU_BYTES) // 4, device="cuda" if cuda else "cpu")
    rates = torch.zeros(len(leaders), device=tensor.device)
    for i, first in enumerate(leaders):
        second = leaders[(i + 1) % len(leaders)]

        def exchange(first: int = first, second: int = second) -> None:
            if dist.get_rank() == first:
                dist.send(tensor, second)
                dist.recv(tensor, second)
            else:
                dist.recv(tensor, first)
                dist.send(tensor, first)

        if first != second and dist.get_rank() in (first, second):
            rates[i] = 2 * tensor.nbytes / _timed(exchange, cuda) / 1e9
        dist.barrier()
    dist.all_reduce(rates, op=dist.ReduceOp.MAX)
    return rates.tolist()


def _timed(work: Callable[[], None], cuda: bool) -> float:
    work()  # the first use opens the connections
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def slow_places(rates: list[float], floor: float) -> list[int]:
    """The places in a ring with both links below `floor`; `rates[i]` is the link from place i to the next."""
    return [i for i in range(len(rates)) if max(rates[i - 1], rates[i]) < floor]
