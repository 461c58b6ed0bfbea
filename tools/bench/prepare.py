"""Preparation and verification in figures: `python -m tools.bench.prepare`.

Images of 500 x 375 pixels from a tar of class tars: images per CPU-second to prepare and to verify, memory for each
image that is listed, and what the checksum of every image costs beside its decoding.
"""

import io
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.data.beton import JPEG, check, checks_of, contents_of, samples_of, verify
from pipeline.data.checksum import checksum
from pipeline.data.decode import jpeg_status
from tools.bench.loader import photographs
from tools.prepare.detect import open_source
from tools.prepare.run import prepare

IMAGES, CLASSES, COPIES = 150, 10, 4


def write_archive(path: Path) -> None:
    """A tar of class tars; each photograph comes in several times."""
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


def cpu_seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        archive, path = Path(place) / "train.tar", Path(place) / "a.beton"
        write_archive(archive)
        prepare(archive, Path(place) / "warm.beton", part_samples=50)  # compiles
        tracemalloc.start()
        source = open_source(str(archive))
        listed_bytes = tracemalloc.get_traced_memory()[0] / len(source.items)
        tracemalloc.stop()
        count = len(source.items)
        print(f"{archive.stat().st_size / count / 1e3:.0f} kB an image, {listed_bytes:.0f} bytes to list it")
        print(f"list     {count / cpu_seconds(lambda: open_source(str(archive))):7.0f} images per CPU-second")
        print(f"prepare  {count / cpu_seconds(lambda: prepare(archive, path)):7.0f} images per CPU-second")
        beton = check(path)
        print(f"verify   {beton.size_bytes / cpu_seconds(lambda: verify(path)) / 1e9:7.2f} GB per CPU-second")
        images, checks = samples_of(beton)["f0"], checks_of(samples_of(beton))
        stored = [(number, np.frombuffer(content, np.uint8)) for number, content in contents_of(beton, JPEG)]
        sums = cpu_seconds(lambda: [checksum(content) == checks[number] for number, content in stored]) / count
        sizes = [(int(images["height"][number]), int(images["width"][number])) for number, _ in stored]
        decoded = (
            cpu_seconds(lambda: [jpeg_status(c, *size) for (_, c), size in zip(stored, sizes, strict=True)]) / count
        )
        print(f"checksum {1e6 * sums:.0f} us an image, decoding {1e6 * decoded:.0f} us: {100 * sums / decoded:.1f} %")


if __name__ == "__main__":
    main()
