"""How long saving a checkpoint blocks the training, and what hashing costs.

    python -m tools.bench.checkpoint_saving [--gigabytes 1 4 8] [--directory DIR] [--device cpu|cuda]

One rank saves a state of fp32 tensors: without hashes (plain torch.distributed.checkpoint), with hashes and COMMIT
while the step waits, and in the background, where the first save also makes its staging buffers. Needs memory for two
states and disk for one; the files are removed.
"""

import argparse
import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from pipeline.checkpoint.store import CheckpointStore, State, flatten
from tools.bench.timing import print_header, print_row, seconds_of

TENSORS = 64


def make_state(gigabytes: float, device: str) -> State:
    """About so many GB, in equal tensors of random numbers."""
    numel = int(gigabytes * 1e9 / 4 / TENSORS)
    return {"model": {f"w{index}": torch.rand(numel, device=device) for index in range(TENSORS)}}


def hash_rate(megabytes: int = 512) -> float:
    """GB/s of sha256 on this machine, in memory."""
    data = bytes(megabytes * 10**6)
    return megabytes / 1000 / seconds_of(lambda: hashlib.sha256(data).digest())


def save_seconds(gigabytes: float, directory: Path, device: str) -> dict[str, tuple[float, float]]:
    """For each way to save: seconds that the step is blocked, and seconds until the checkpoint is committed."""
    state, results = make_state(gigabytes, device), {}
    store = CheckpointStore(
        directory / "checkpoints",
        attempt=1,
        group=dist.group.WORLD,
        still_current=lambda: True,
        facts={},
        on_event=print,
    )
    writer = FsspecWriter(f"file://{directory}/checkpoints")
    seconds = seconds_of(lambda: dcp.save(flatten(state), storage_writer=writer))
    results["waiting, no hashes"] = seconds, seconds
    shutil.rmtree(directory / "checkpoints")
    seconds = seconds_of(lambda: store.save(state, step=1, why="bench"))
    results["waiting, hashes"] = seconds, seconds
    shutil.rmtree(directory / "checkpoints")
    for step, which in enumerate(("first", "later"), 2):
        began = time.perf_counter()
        save = store.save_in_background(state, step=step, why="bench")
        blocked = time.perf_counter() - began
        save.wait()
        if save.error:
            raise save.error
        results[f"background, {which}"] = blocked, save.seconds
        shutil.rmtree(directory / "checkpoints")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 8])
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    print(f"sha256 in memory: {hash_rate():.2f} GB/s\n")
    print_header(["state", "save", "blocked s", "until committed s", "GB/s"])
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-", dir=options.directory) as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/meeting", rank=0, world_size=1)
        for gigabytes in options.gigabytes:
            for save, (blocked, seconds) in save_seconds(gigabytes, Path(name), options.device).items():
                print_row([f"{gigabytes:g} GB", save, f"{blocked:.2f}", f"{seconds:.1f}", f"{gigabytes / seconds:.2f}"])
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
