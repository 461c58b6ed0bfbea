"""Checkpoints among real gloo processes: other world sizes, failing and killed ranks, kills at random moments."""

import contextlib
import itertools
import os
import random
import resource
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipeline.checkpoint import CheckpointStore, prune_store
from pipeline.checkpoint.store import ever_committed
from pipeline.errors import CheckpointError
from tests.processes import PROCESSES

TIMEOUT_SECONDS = 200
_meetings = itertools.count()


def start(directory: Path, world: int, work, *arguments):
    """`work(store, rank, *arguments)` on each rank, as attempt `arguments[0]`; returns processes and their pipes."""
    meeting = directory / f"meeting-{os.getpid()}-{next(_meetings)}"
    ranks = []
    for rank in range(world):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_rank, args=(directory, meeting, rank, world, theirs, work, arguments))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return ranks


def _rank(directory, meeting, rank, world, pipe, work, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    events: list[str] = []
    store = CheckpointStore(
        directory / "checkpoints",
        attempt=arguments[0],
        group=dist.group.WORLD,
        still_current=lambda: True,
        facts={},
        on_event=events.append,
    )
    try:
        outcome = work(store, rank, *arguments)
    except CheckpointError as error:
        outcome = f"CheckpointError: {error}"
    except Exception:
        outcome = traceback.format_exc()
    pipe.send((outcome, events))
    dist.destroy_process_group()


def run(directory: Path, world: int, work, *arguments) -> tuple[list, list[list[str]]]:
    """What each rank returned, or its error as text, or its exit code if it was killed; and each rank's events."""
    outcomes, events = [], []
    for process, pipe in start(directory, world, work, *arguments):
        try:
            outcome, said = pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else ("hangs", [])
        except EOFError:
            process.join()
            outcome, said = process.exitcode, []
        process.kill() if outcome == "hangs" else process.join(TIMEOUT_SECONDS)
        outcomes.append(outcome)
        events.append(said)
    return outcomes, events


def make_state(step: int, tensors: int = 9, numel: int = 5000) -> dict:
    """Raw bits, so that NaNs, infinities, -0.0 and subnormal numbers are among the values."""
    generator = torch.Generator().manual_seed(step)
    bits = [torch.randint(-(2**31), 2**31, (numel,), generator=generator).int() for _ in range(tensors)]
    return {
        "model": {f"w{index}": value.view(torch.float32) for index, value in enumerate(bits)},
        "optim": {"w0": {"exp_avg": bits[0].double().view(-1, 5), "low": bits[1][:1000].view(torch.bfloat16)}},
        "step": torch.tensor(step),
    }


def blank() -> dict:
    return map_tensors(make_state(0), torch.zeros_like)


def map_tensors(tree, function):
    return {
        key: function(value) if isinstance(value, torch.Tensor) else map_tensors(value, function)
        for key, value in tree.items()
    }


def bits_of(tree) -> list[bytes]:
    found: list[bytes] = []
    map_tensors(tree, lambda tensor: found.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))
    return found


def save(store, rank, attempt, step):
    return store.save(make_state(step), step=step, why="due")


def restore(store, rank, attempt):
    state = blank()
    step = store.restore(state)
    return step, bits_of(state) == bits_of(make_state(step))


@pytest.mark.parametrize("world", [2, 4])
def test_saved_on_some_ranks_and_restored_on_others_to_the_bit(tmp_path, world):
    outcomes, _ = run(tmp_path, world, save, 1, 12)
    assert outcomes == ["step-000000012.000001"] * world
    written = [(tmp_path / "checkpoints" / outcomes[0] / f"__{rank}_0.distcp").stat().st_size for rank in range(world)]
    assert min(written) > max(written) / 3, "each rank writes a share"
    for other in (1, 2, 4):
        outcomes, events = run(tmp_path, other, restore, 2)
        assert outcomes == [(12, True)] * other
        assert not any(events)


def save_sharded(store, rank, attempt):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor  # noqa: E731
    return store.save(map_tensors(make_state(5), shard), step=5, why="due")


def restore_sharded(store, rank, attempt):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor  # noqa: E731
    state = map_tensors(blank(), shard)
    step = store.restore(state)
    full = map_tensors(state, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return step, bits_of(full) == bits_of(make_state(5))


def test_sharded_and_plain_tensors_are_one_checkpoint(tmp_path):
    assert run(tmp_path, 2, save_sharded, 1)[0] == ["step-000000005.000001"] * 2
    assert run(tmp_path, 1, restore, 2)[0] == [(5, True)]
    assert run(tmp_path, 4, restore_sharded, 2)[0] == [(5, True)] * 4


def save_with_one_full_disk(store, rank, attempt, numel):
    first = store.save(make_state(1), step=1, why="due")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # its files may not grow: the error of a full disk or an exhausted quota, met for real
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    error = ""
    try:
        store.save(make_state(2, numel=numel), step=2, why="due")
    except CheckpointError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    steps = [name.step for name in store.committed()]
    dist.barrier()
    return first, error, steps, store.save(make_state(2), step=2, why="again")


@pytest.mark.parametrize("numel", [5000, 1_000_000])  # the error comes when a buffer is flushed, or inside torch.save
def test_a_rank_that_cannot_write_stops_all_and_commits_nothing(tmp_path, numel):
    outcomes, _ = run(tmp_path, 2, save_with_one_full_disk, 1, numel)
    assert outcomes[0] == outcomes[1]
    _, error, steps, again = outcomes[0]
    assert "rank 1" in error
    assert "File too large" in error
    assert "\n" not in error
    assert steps == [1]
    assert again == "step-000000002.000001"
    assert run(tmp_path, 1, restore, 2)[0] == [(2, True)]


def save_while_rank_one_dies(store, rank, attempt):
    store.save(make_state(1), step=1, why="due")
    if rank == 1:  # the kernel kills it in the middle of a write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return store.save(make_state(2), step=2, why="due")


def test_a_rank_killed_in_the_middle_of_a_write_leaves_nothing_to_believe(tmp_path):
    outcomes, _ = run(tmp_path, 2, save_while_rank_one_dies, 1)
    assert outcomes[1] == -signal.SIGXFSZ
    assert "Error" in outcomes[0]
    assert (tmp_path / "checkpoints" / "step-000000002.000001").exists()
    outcomes, events = run(tmp_path, 2, restore, 2)
    assert outcomes == [(1, True)] * 2
    assert not any(events)


def restore_with_one_other_shape(store, rank, attempt):
    state = blank()
    if rank == 1:
        state["model"]["w3"] = torch.zeros(4999)
    return store.restore(state)


def test_damage_and_misfits_are_met_by_all_ranks_alike(tmp_path):
    run(tmp_path, 2, save, 1, 1)
    run(tmp_path, 2, save, 1, 2)
    outcomes, _ = run(tmp_path, 2, restore_with_one_other_shape, 2)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith("CheckpointError")
    assert "model.w3 is (5000,) float32 in the checkpoint and (4999,) float32 here" in outcomes[0]
    newest = tmp_path / "checkpoints" / "step-000000002.000001" / "__1_0.distcp"
    data = bytearray(newest.read_bytes())
    data[777] ^= 4
    newest.write_bytes(data)
    outcomes, events = run(tmp_path, 2, restore, 3)
    assert outcomes == [(1, True)] * 2
    assert "__1_0.distcp has another sha256" in events[0][0]
    assert events[1] == []


def save_for_ever(store, rank, attempt, pipe):
    """Resume, check, then save step after step, telling each step that is safe, until killed."""
    last = 0
    if ever_committed(store.folder):
        state = blank()
        last = store.restore(state)
        assert bits_of(state) == bits_of(make_state(last)), f"step {last} is not what was saved"
    pipe.send(("resumed", last))
    for step in itertools.count(last + 1):
        store.save(make_state(step), step=step, why="due")
        pipe.send(("saved", step))
        prune_store(store, keep_last=2)


def test_kills_at_random_moments_never_lose_or_invent_a_step(tmp_path):
    chance = random.Random(3)
    safe, torn, pause_seconds = 0, set(), 0.05
    for attempt in itertools.count(1):
        if attempt > 10 and len(torn) >= 2:
            break
        assert attempt <= 40, "the kills must hit saves, or this shows nothing"
        ours, theirs = PROCESSES.Pipe(duplex=False)
        [(process, outcome)] = start(tmp_path, 1, save_for_ever, attempt, theirs)
        theirs.close()
        assert ours.poll(TIMEOUT_SECONDS)
        said, step = ours.recv()
        assert said == "resumed"
        assert step >= safe, f"step {safe} was saved, but the resume found {step}"
        for _ in range(chance.randint(1, 3)):
            began = time.monotonic()
            assert ours.poll(TIMEOUT_SECONDS)
            safe = ours.recv()[1]
            pause_seconds = time.monotonic() - began
        time.sleep(chance.uniform(0, pause_seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, outcome.recv()
        with contextlib.suppress(EOFError):
            while ours.poll():
                safe = ours.recv()[1]
        folders = (tmp_path / "checkpoints").glob("step-*")
        torn |= {folder.name for folder in folders if not (folder / "COMMIT").exists()}
    assert safe >= 10
    assert not (tmp_path / "checkpoints" / "quarantine").exists(), "a kill leaves no damage, only leftovers"
    assert all(step >= safe and right for step, right in run(tmp_path, 2, restore, attempt)[0])
