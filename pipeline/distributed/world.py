"""The process group of a stage: who am I among how many."""

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
from pipeline.errors import RecipeError

T = TypeVar("T")


def backends(device: torch.device) -> str:
    """The default group's, for tensors on `device` and on the CPU: there lies what an engine offloads."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@dataclass(frozen=True)
class World:
    """This process's place. `group` is a CPU (gloo) group for agreements and checkpoints, beside the default one."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup

    @classmethod
    def join(cls, device: str = "auto", threads: int = 0, timeout_seconds: float = 600) -> "World":
        """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        Without them this is a world of one. One rank per GPU; on CPUs the machine's cores are shared by its ranks.

        Raises:
            RecipeError: if this rank is to have a GPU and there is none for it.
        """
        place = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
        local_rank = int(os.environ.get("LOCAL_RANK", place["RANK"]))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", place["WORLD_SIZE"]))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            seen = torch.cuda.device_count()
            if local_rank >= seen:
                raise RecipeError(
                    f"device is {device} and this machine shows {seen} GPUs to its {local_size} processes; run one"
                    " process for each GPU, or set engine.device to cpu"
                )
            torch.cuda.set_device(where)
        timeout = timedelta(seconds=timeout_seconds)
        # Engines make groups of their own: by torch's defaults those would give up before the watchdog can tell why.
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backends(where), timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backends(where), store=store, rank=0, world_size=1, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
        world = cls(place["RANK"], local_rank, place["WORLD_SIZE"], local_size, where, group)
        torch.set_num_threads(threads or world.threads())
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The largest value of any rank: collective, about a millisecond, on the CPU."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, on rank 0; on every rank."""
        return from_rank_zero(work, self.group)

    def on_every_rank(self, work: Callable[[], T], should_stop: Callable[[], bool]) -> T | None:
        """What `work` returns, or raises, once all ranks have done theirs; None if they agreed to stop before."""
        return on_every_rank(work, self.group, should_stop)

    def cores(self) -> int:
        """The cores this rank may use: those of its affinity mask, shared with the ranks that have them too.

        Collective. No launcher needs to say how many ranks a machine has.
        """
        own = (socket.gethostname(), os.sched_getaffinity(0))
        ranks = [own] * self.size
        dist.all_gather_object(ranks, own, group=self.group)
        return max(len(own[1]) // sum(host == own[0] and bool(cores & own[1]) for host, cores in ranks), 1)

    def threads(self, before: int | None = None) -> int:
        """How many threads torch takes on each rank: what its launcher grants in OMP_NUM_THREADS, else its cores.

        The number decides how sums are rounded. So all ranks take the least that any of them has, and `before`, the
        number of an earlier attempt, is kept where there are so many. Collective.
        """
        cores, granted = self.cores(), os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        own = int(granted) if granted.isdigit() and int(granted) else cores
        if before and self.agree(int(before > max(own, cores))) == 0:
            return before
        return -self.agree(-own)

    def leave(self, broken: bool = False) -> None:
        """Leave the group, so that the process can end.

        A `broken` one is left as it is on GPUs: nccl would wait in there for what ranks that are gone have not sent.
        The process must then end at once.
        """
        if dist.is_initialized() and not (broken and self.device.type == "cuda"):
            dist.destroy_process_group()
