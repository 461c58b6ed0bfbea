"""The ranks of a stage: which one this process is, and what they decide together."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from pipeline.distributed.collective import from_rank_zero, on_every_rank
from pipeline.distributed.processes import gpu_of_rank, shared_gpus
from pipeline.errors import RecipeError, RetryableError

T = TypeVar("T")


def _store_of_this_machine(address: str, port: int, size: int, timeout: timedelta) -> dist.Store:
    """Start rank 0's store at a loopback address alone, where torch would listen on all interfaces of the machine."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the launcher holds the port, see `reserve_port`
    listener.bind((address, port))
    listener.listen(2 * size + 16)
    store = dist.TCPStore(
        address, port, size, is_master=True, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    return dist.PrefixStore("default_pg", store)  # the prefix under which the other ranks look


def backends(device: torch.device) -> str:
    """Return the default group's backends: for tensors on `device`, and for offloaded ones on the CPU."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def match_timeout(group: dist.ProcessGroup) -> None:
    """Let a group wait as long as the default group, on GPUs and on the CPU: the CPU half of a group that was split off
    NCCL's may have torch's default, which ends before the watchdog finds the cause."""
    if dist.get_backend(group) != "fake":
        c10d._set_pg_timeout(c10d.default_pg_timeout, group)


@dataclass(frozen=True)
class World:
    """This process among the ranks of a stage.

    group: a CPU (gloo) group for agreements and checkpoints, beside the default group; None in a world that has not
        joined one.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @classmethod
    def alone(cls, device: str | torch.device = "cpu") -> "World":
        """Return a world of one rank without process groups, for programs that read data but train nothing."""
        return cls(0, 0, 1, torch.device(device), None)

    @classmethod
    def join(cls, device: str = "auto", threads: int = 0, timeout_seconds: float = 600) -> "World":
        """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Without these variables the world has one rank. Each rank gets one GPU, see `gpu_of_rank`; on CPUs the ranks of
        a machine share its cores.

        Raises:
            RecipeError: if there is no GPU for this rank.
        """
        rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        own_device, visible = torch.device("cpu"), torch.cuda.device_count() if cuda else 0
        too_few = RecipeError(
            f"device is {device} and this machine shows {visible} GPUs to its {local_size} processes; run one"
            " process for each GPU, or set engine.device to cpu"
        )
        if cuda:
            if (number := gpu_of_rank(local_rank, local_size, visible)) is None:
                raise too_few
            own_device = torch.device("cuda", number)
            torch.cuda.set_device(own_device)
        timeout = timedelta(seconds=timeout_seconds)
        # The group is bound to its GPU, so that no collective has to guess it, and no rank touches another's.
        bound = {"device_id": own_device} if cuda else {}
        # Engines make their own groups. With torch's default these would time out before the watchdog finds the cause.
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
        if "MASTER_ADDR" in os.environ and rank == 0 and os.environ["MASTER_ADDR"].startswith("127."):
            store = _store_of_this_machine(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, timeout)
            place = {"store": store, "rank": 0, "world_size": size}
            dist.init_process_group(backends(own_device), **place, timeout=timeout, **bound)
        elif "MASTER_ADDR" in os.environ:
            dist.init_process_group(backends(own_device), timeout=timeout, **bound)
        else:
            store = dist.HashStore()
            place = {"store": store, "rank": 0, "world_size": 1}
            dist.init_process_group(backends(own_device), **place, timeout=timeout, **bound)
        group = dist.new_group(backend="gloo", timeout=timeout)
        if size > 1:
            places: list = [None] * size
            gpu = str(torch.cuda.get_device_properties(own_device).uuid) if cuda else ""
            dist.all_gather_object(places, (socket.gethostname(), gpu), group=group)
            without = {host for host, gpu in places if not gpu}
            if without and len(without) < len({host for host, _ in places}):
                raise RetryableError(f"{', '.join(sorted(without))} shows no GPU, and other nodes of the job do")
            if not without and shared_gpus(places):
                raise too_few
        world = cls(rank, local_rank, size, own_device, group)
        torch.set_num_threads(threads or world.threads())
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """Return the largest value of any rank. Collective on the CPU, about a millisecond."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a CPU tensor over all ranks, in place, and return it. Collective."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def concatenate(self, own: torch.Tensor) -> torch.Tensor:
        """Return the CPU tensors of all ranks along their first dimension, whose lengths may differ. Collective."""
        if self.size == 1:
            return own
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]), group=self.group)
        padded = own.new_zeros(max(int(torch.cat(lengths).max()), 1), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def gather(self, own: T) -> list[T]:
        """Return every rank's object. Collective."""
        everyone = [own] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def on_main(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 and return its result, or raise its error, on every rank. Collective."""
        return from_rank_zero(work, self.group)

    def on_every_rank(self, work: Callable[[], T], should_stop: Callable[[], bool]) -> T | None:
        """Call `work` on every rank and wait for all of them; None if they agreed to stop before. Collective.

        An error on one rank is raised on all of them.
        """
        return work() if self.group is None else on_every_rank(work, self.group, should_stop)

    def cores(self) -> int:
        """Return how many cores this rank may use: its affinity mask's, divided among the ranks that share them.

        Collective, so no launcher has to say how many ranks a machine has.
        """
        own = (socket.gethostname(), os.sched_getaffinity(0))
        ranks = self.gather(own)
        return max(len(own[1]) // sum(host == own[0] and bool(cores & own[1]) for host, cores in ranks), 1)

    def threads(self, before: int | None = None) -> int:
        """Return torch's threads per rank: OMP_NUM_THREADS, else this rank's cores. Collective.

        The number of threads decides how sums are rounded. So all ranks take the smallest number of any rank, and
        `before`, the number of an earlier attempt, is kept if every rank has that many.
        """
        cores, granted = self.cores(), os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        own = int(granted) if granted.isdigit() and int(granted) else cores
        if before and self.agree(int(before > max(own, cores))) == 0:
            return before
        return -self.agree(-own)

    def leave(self, broken: bool = False) -> None:
        """Leave the process group, so that the process can end.

        A `broken` group on GPUs is not left, because nccl would wait for ranks that are gone. The process must then
        end at once.
        """
        if dist.is_initialized() and not (broken and self.device.type == "cuda"):
            dist.destroy_process_group()
