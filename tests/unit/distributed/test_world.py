"""Joining a group: what a rank without a GPU is told, and how long groups wait that are made later."""

import os
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.world import World, backends, match_timeout
from pipeline.errors import RecipeError
from tests.ranks import on_ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_a_gpu_that_is_not_there_is_told_in_a_sentence():
    with pytest.raises(RecipeError, match=r"device is cuda and this machine shows 0 GPUs"):
        World.join("cuda")


def _listening_addresses(world: World) -> list[str]:
    """The addresses at which this process listens, in the kernel's hexadecimal notation."""
    own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    world.agree(0)
    return sorted({row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own})


def test_ranks_of_one_machine_listen_on_loopback_alone():
    """Torch's own store listens on every interface, so that anybody in the network can read and write it."""
    assert on_ranks(2, _listening_addresses) == [["0100007F"]] * 2


@pytest.fixture
def patient_world():
    """A world of one rank whose collectives may take 4321 seconds."""
    threads = torch.get_num_threads()
    world = World.join("cpu", threads=1, timeout_seconds=4321)
    yield world
    world.leave()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("patient_world")
def test_groups_that_engines_make_wait_as_long_as_the_world():
    group = dist.new_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=4321)


@pytest.mark.usefixtures("patient_world")
def test_a_group_with_a_timeout_of_its_own_gets_the_worlds():
    group = dist.new_group(timeout=timedelta(seconds=5))  # as a half that was split off with torch's default
    match_timeout(group)
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=4321)


def test_work_on_every_rank_has_the_context_of_its_caller(patient_world):
    """From 2.13 on torch keeps there how many processes compile, and 32 of each rank are too many."""
    setting = ContextVar("setting", default=0)
    setting.set(3)
    assert patient_world.on_every_rank(setting.get, lambda: False) == 3


def test_beside_a_gpu_the_cpu_can_talk_too():
    """FSDP and ZeRO sum and gather what they have offloaded where it lies."""
    found = dist.distributed_c10d.BackendConfig(dist.Backend(backends(torch.device("cuda", 1))))
    assert found.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_nccl_is_not_asked_to_wait_for_ranks_that_are_gone(patient_world):
    replace(patient_world, device=torch.device("cuda", 0)).leave(broken=True)
    assert dist.is_initialized()
    patient_world.leave(broken=True)
    assert not dist.is_initialized()
