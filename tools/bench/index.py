"""What a data set's index costs each rank: `python -m tools.bench.index` (a minute and a half of CPU, 8 GB for FFCV).

The file is sparse: the index of ImageNet-1K or -22K, real in every byte, and holes where the images would be. Each line
is a process of its own. Private memory is what every rank of a machine pays again; the file's pages they share.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.data.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    PAGE_BYTES,
    SAMPLE,
    Beton,
    BetonWriter,
    check,
    read_sidecar,
    sidecar_path,
)

IMAGE_BYTES = 110_000  # ImageNet's average
SIZES = {"ImageNet-1K": (1_281_167, 1000), "ImageNet-22K": (14_197_122, 21_841)}


def write(directory: Path, samples: int, classes: int) -> Path:
    """A .beton of that many samples without their images, and its side-car."""
    with BetonWriter(directory / "one.beton", ["c"], 1) as writer:
        writer.add(np.zeros((1, 1, 3), np.uint8), 0)
    head = (directory / "one.beton").read_bytes()[HEADER.itemsize : HEADER.itemsize + 2 * FIELD.itemsize]
    header = np.frombuffer((directory / "one.beton").read_bytes(), HEADER, 1).copy()
    begin = -(-(HEADER.itemsize + len(head) + samples * SAMPLE.itemsize) // PAGE_BYTES) * PAGE_BYTES
    per_page = PAGE_BYTES // IMAGE_BYTES
    number = np.arange(samples)
    table = np.zeros(samples, ALLOCATION)
    table["sample_id"], table["size"] = number, IMAGE_BYTES
    table["ptr"] = begin + number // per_page * PAGE_BYTES + number % per_page * IMAGE_BYTES
    rows = np.zeros(samples, SAMPLE)
    rows["f0"]["width"], rows["f0"]["height"], rows["f0"]["data_ptr"] = 500, 375, table["ptr"]
    rows["f1"] = np.random.default_rng(0).integers(classes, size=samples)
    header["num_samples"] = samples
    header["alloc_table_ptr"] = begin + -(-samples // per_page) * PAGE_BYTES
    path = directory / f"{samples}.beton"
    front = header.tobytes() + head + rows.tobytes()
    with path.open("wb") as file:
        file.write(front)
        file.seek(int(header["alloc_table_ptr"][0]))
        file.write(table.tobytes())
    beton = read_sidecar(directory / "one.beton").model_copy(
        update={
            "samples": samples,
            "classes": tuple(f"c{n}" for n in range(classes)),
            "samples_per_class": tuple(np.bincount(rows["f1"], minlength=classes).tolist()),
            "size_bytes": path.stat().st_size,
            "index_sha256": hashlib.sha256(front + table.tobytes()).hexdigest(),
        }
    )
    sidecar_path(path).write_text(beton.model_dump_json())
    return path


def ffcv_opens(path: Path) -> object:
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader

    return OSCacheManager(Reader(path))


def check_of(path: Path) -> Beton:
    return check(path)


def loader_of(path: Path) -> object:
    from pipeline.data.crops import EvaluationPlan
    from pipeline.data.ffcv_loader import ImageLoader

    beton = read_sidecar(path)
    loader = ImageLoader(beton, image_size=8, plan=EvaluationPlan(8, 1.0), batch_size=8, workers=1, batches_ahead=1)
    loader.reader.metadata[np.random.default_rng(0).integers(beton.samples, size=beton.samples // 8)]  # a rank's epoch
    return loader


def order_of(path: Path, world_size: int) -> np.ndarray:
    from pipeline.data.order import rank_slots, train_order

    return np.ascontiguousarray(rank_slots(train_order(1, 2, read_sidecar(path).samples, 4096), 64, 0, world_size))


def order_by_argsort(path: Path) -> np.ndarray:
    from pipeline.randomness import Purpose, key

    return np.argsort(key(1, 2, np.arange(read_sidecar(path).samples), Purpose.ORDER), kind="stable")


def subset_of(path: Path) -> object:
    from pipeline.data.subset import select

    return select(read_sidecar(path), fraction=0.01)


WORK: dict[str, Callable[[Path], object]] = {
    "FFCV 1.0.2: Reader and memory manager": ffcv_opens,
    "check: index against its hash": check_of,
    "loader, an eighth of the rows read": loader_of,
    "order of an epoch, as kept until now (argsort)": order_by_argsort,
    "order of an epoch, 1 rank": lambda path: order_of(path, 1),
    "order of an epoch, 1 of 8 ranks": lambda path: order_of(path, 8),
    "subset of 1 %": subset_of,
}


def memory() -> dict[str, int]:
    """Bytes of this process by the kernel's account: private, shared with others, and the most there ever was."""
    found = dict.fromkeys(("private", "file", "peak"), 0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        if name == "Anonymous:":
            found["private"] = int(kilobytes) * 1024
        elif name == "Rss:":
            found["file"] = int(kilobytes) * 1024
    found["file"] -= found["private"]
    status = Path("/proc/self/status").read_text()
    found["peak"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return found


def measure(name: str, path: Path) -> None:
    work = WORK[name]
    small = path.with_name("one.beton")
    if name.startswith(("loader", "FFCV")):
        work(small)  # imports, and what is compiled once
    else:
        from pipeline.data import order, subset  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began, cpu = memory(), time.perf_counter(), time.process_time()
    kept = work(path)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    after = memory()
    used = {key: max(after[key] - before[key], 0) / 1e6 for key in ("private", "file")}
    peak = (after["peak"] - before["private"] - before["file"]) / 1e6
    print(
        f"| {name} | {seconds:.2f} | {cpu:.2f} | {used['private']:.0f} | {used['file']:.0f} | {peak:.0f} |", flush=True
    )
    del kept


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as directory:
        for title, (samples, classes) in SIZES.items():
            path = write(Path(directory), samples, classes)
            on_disk = path.stat().st_blocks * 512
            print(
                f"\n{title}: {samples:,} samples, index {on_disk / 1e6:.0f} MB of {path.stat().st_size / 1e9:.0f} GB\n"
            )
            print(
                "| | seconds | of CPU | private MB | file pages MB | peak MB |\n|---|---|---|---|---|---|", flush=True
            )
            for name in WORK:
                subprocess.run([sys.executable, "-m", "tools.bench.index", name, str(path)], env=os.environ, check=True)
            path.unlink()


if __name__ == "__main__":
    main()
