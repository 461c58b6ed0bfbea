"""Throughput of preparation and verification: `python -m tools.bench.prepare_throughput`.

Photographs come from a tar of class tars. Figures are images per CPU-second to list, prepare and verify them, the
memory of each listed image, and the time of an image's checksum beside that of its decoding.
"""

import io
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.data.beton import JPEG, checksums_of, contents_of, open_beton, samples_of, verify_hashes
from pipeline.data.decode import jpeg_status
from pipeline.data.image_checksum import checksum
from tools.bench.photographs import photographs
from tools.bench.timing import cpu_seconds, seconds_of
from tools.prepare.detect import open_source
from tools.prepare.preparation import prepare_beton

IMAGES, CLASSES, COPIES = 150, 10, 4


def write_archive(path: Path) -> None:
    """Write a tar of class tars, in which each photograph occurs several times."""
    contents = []
    for image in photographs(IMAGES):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    with tarfile.open(path, "w") as outer:
        for label in range(CLASSES):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for number, content in enumerate(contents[label::CLASSES] * COPIES):
                    _add(inner, f"n{label:08d}_{number}.JPEG", content)
            _add(outer, f"n{label:08d}.tar", file.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive, path = Path(folder) / "train.tar", Path(folder) / "a.beton"
        write_archive(archive)
        prepare_beton(archive, Path(folder) / "warm.beton", part_samples=50)  # compiles
        tracemalloc.start()
        source = open_source(str(archive))
        count = len(source.items)
        listed_bytes = tracemalloc.get_traced_memory()[0] / count
        tracemalloc.stop()
        print(f"{archive.stat().st_size / count / 1e3:.0f} kB an image, {listed_bytes:.0f} bytes to list it")
        print(f"list     {count / _seconds(lambda: open_source(str(archive))):7.0f} images per CPU-second")
        print(f"prepare  {count / _seconds(lambda: prepare_beton(archive, path)):7.0f} images per CPU-second")
        beton = open_beton(path)
        print(f"verify   {beton.size_bytes / _seconds(lambda: verify_hashes(path)) / 1e9:7.2f} GB per CPU-second")
        images, checks = samples_of(beton)["f0"], checksums_of(samples_of(beton))
        stored = [(number, np.frombuffer(content, np.uint8)) for number, content in contents_of(beton, JPEG)]
        sizes = [(int(images["height"][number]), int(images["width"][number])) for number, _ in stored]
        sums = _seconds(lambda: [checksum(content) == checks[number] for number, content in stored])
        decoding = _seconds(lambda: [jpeg_status(c, *size) for (_, c), size in zip(stored, sizes, strict=True)])
        each = f"{1e6 * sums / count:.0f} us an image, decoding {1e6 * decoding / count:.0f} us"
        print(f"checksum {each}: {100 * sums / decoding:.1f} %")


def _seconds(work: Callable[[], object]) -> float:
    return seconds_of(work, cpu_seconds)


if __name__ == "__main__":
    main()
