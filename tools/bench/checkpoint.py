"""How long a save blocks the training, and what hashing costs:

    python -m tools.bench.checkpoint [--gigabytes 1 4 8] [--directory DIR] [--device cpu|cuda]

One rank and a state of fp32 tensors, saved in turn without hashes (plain torch.distributed.checkpoint), with hashes
and COMMIT while the step waits, and in the background: there the first save also makes its staging buffers. Needs
twice the state in memory, and once on the disk; what it writes is removed.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from pipeline.checkpoint.store import CheckpointStore, State, flatten

TENSORS = 64


def make_state(gigabytes: float, device: str) -> State:
    """About so many GB, in equal tensors of random numbers."""
    numel = int(gigabytes * 1e9 / 4 / TENSORS)
    return {"model": {f"w{index}": torch.rand(numel, device=device) for index in range(TENSORS)}}


def hash_rate(megabytes: int = 512) -> float:
    """GB/s of sha256 on this machine, in memory."""
    data = bytes(megabytes * 10**6)
    began = time.perf_counter()
    hashlib.sha256(data).digest()
    return megabytes / 1000 / (time.perf_counter() - began)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(gigabytes: float, directory: Path, device: str) -> dict[str, tuple[float, float]]:
    """Seconds for which the step is blocked, and until the checkpoint is committed, by way of saving."""
    state, found = make_state(gigabytes, device), {}
    store = CheckpointStore(
        directory / "checkpoints",
        attempt=1,
        group=dist.group.WORLD,
        still_current=lambda: True,
        facts={},
        on_event=print,
    )

    def plain() -> None:
        dcp.save(flatten(state), storage_writer=FsspecWriter(f"file://{directory}/plain"))

    seconds = timed(plain)
    found["waiting, no hashes"] = seconds, seconds
    shutil.rmtree(directory / "plain")
    seconds = timed(lambda: store.save(state, step=1, why="bench"))
    found["waiting, hashes"] = seconds, seconds
    shutil.rmtree(directory / "checkpoints")
    for step, which in enumerate(("first", "later"), 2):
        began = time.perf_counter()
        save = store.save_in_background(state, step=step, why="bench")
        blocked = time.perf_counter() - began
        save.wait()
        if save.error:
            raise save.error
        found[f"background, {which}"] = blocked, save.seconds
        shutil.rmtree(directory / "checkpoints")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 8])
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    print(f"sha256 in memory: {hash_rate():.2f} GB/s\n")
    print("| state | way | blocked s | until committed s | GB/s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-", dir=given.directory) as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/meeting", rank=0, world_size=1)
        for gigabytes in given.gigabytes:
            for way, (blocked, seconds) in measure(gigabytes, Path(name), given.device).items():
                rate = gigabytes / seconds
                print(f"| {gigabytes:g} GB | {way} | {blocked:.2f} | {seconds:.1f} | {rate:.2f} |", flush=True)
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
