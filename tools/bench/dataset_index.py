"""Time and memory of a data set's index on each rank: `python -m tools.bench.dataset_index`.

Takes a minute and a half of CPU, and 8 GB of memory for FFCV. The files are sparse: the whole index of ImageNet-1K or
-22K, and holes in place of the images. Each line is a process of its own. Every rank of a machine needs the private
memory again; the ranks share the file's pages.
"""

import argparse
import hashlib
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
    BetonWriter,
    open_beton,
    read_sidecar,
    sidecar_path,
)
from tools.bench.timing import print_header, print_row

IMAGE_BYTES = 110_000  # ImageNet's average
SIZES = {"ImageNet-1K": (1_281_167, 1000), "ImageNet-22K": (14_197_122, 21_841)}


def write_index(directory: Path, samples: int, classes: int) -> Path:
    """Write a .beton file of so many samples without their images, and its side-car."""
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


def open_with_ffcv(path: Path) -> object:
    from ffcv.memory_managers import OSCacheManager
    from ffcv.reader import Reader

    return OSCacheManager(Reader(path))


def open_loader(path: Path) -> object:
    from pipeline.data.crops import EvaluationPlan
    from pipeline.data.ffcv_loader import ImageLoader
    from pipeline.data.subset import Subset

    beton = read_sidecar(path)
    loader = ImageLoader(Subset(beton), EvaluationPlan(8, 1.0), batch_size=8, workers=1)
    loader.reader.metadata[np.random.default_rng(0).integers(beton.samples, size=beton.samples // 8)]  # a rank's epoch
    return loader


def rank_order(path: Path, world_size: int) -> np.ndarray:
    from pipeline.data.order import rank_slots, train_order

    return np.ascontiguousarray(rank_slots(train_order(1, 2, read_sidecar(path).samples, 4096), 64, 0, world_size))


def argsort_order(path: Path) -> np.ndarray:
    from pipeline.randomness import Purpose, key

    return np.argsort(key(1, 2, np.arange(read_sidecar(path).samples), Purpose.ORDER), kind="stable")


def choose_subset(path: Path) -> object:
    from pipeline.data.subset import select_subset

    return select_subset(read_sidecar(path), fraction=0.01)


WORK: dict[str, Callable[[Path], object]] = {
    "FFCV 1.0.2: Reader and memory manager": open_with_ffcv,
    "check: index against its hash": open_beton,
    "loader, an eighth of the rows read": open_loader,
    "order of an epoch, as kept until now (argsort)": argsort_order,
    "order of an epoch, 1 rank": lambda path: rank_order(path, 1),
    "order of an epoch, 1 of 8 ranks": lambda path: rank_order(path, 8),
    "subset of 1 %": choose_subset,
}


def memory_bytes() -> dict[str, int]:
    """Memory of this process as the kernel counts it: private, pages of files, and the highest total so far."""
    rollup = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, total, peak = rollup["Anonymous:"], rollup["Rss:"], status["VmHWM"].split()[0]
    return {"private": 1024 * int(private), "file": 1024 * (int(total) - int(private)), "peak": 1024 * int(peak)}


def measure_work(name: str, path: Path) -> None:
    """Do one of WORK with a file and print its row."""
    work = WORK[name]
    if name.startswith(("loader", "FFCV")):
        work(path.with_name("one.beton"))  # imports and compiles
    else:
        from pipeline.data import order, subset  # noqa: F401
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began, cpu_began = memory_bytes(), time.perf_counter(), time.process_time()
    kept = work(path)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    after = memory_bytes()
    rises = [max(after[kind] - before[kind], 0) for kind in ("private", "file")]
    rises.append(after["peak"] - before["private"] - before["file"])
    print_row([name, f"{seconds:.2f}", f"{cpu:.2f}", *(f"{rise / 1e6:.0f}" for rise in rises)])
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--work", nargs=2, metavar=("NAME", "BETON"), help="one row, in this process")
    options = parser.parse_args()
    if options.work:
        name, path = options.work
        measure_work(name, Path(path))
        return
    with tempfile.TemporaryDirectory() as directory:
        for title in options.sizes:
            samples, classes = SIZES[title]
            path = write_index(Path(directory), samples, classes)
            index, whole = path.stat().st_blocks * 512 / 1e6, path.stat().st_size / 1e9
            print(f"\n{title}: {samples:,} samples, index {index:.0f} MB of {whole:.0f} GB\n")
            print_header(["", "seconds", "of CPU", "private MB", "file pages MB", "peak MB"])
            for name in WORK:
                command = [sys.executable, "-m", "tools.bench.dataset_index", "--work", name, str(path)]
                subprocess.run(command, check=True)
            path.unlink()


if __name__ == "__main__":
    main()
