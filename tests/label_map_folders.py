"""Folders and archives of photographs with masks: coloured shapes on scikit-image's photographs, exact masks."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.archives import encoded, photograph

SHAPES = ("background", "red", "green", "blue", "yellow", "violet")
_TINTS = ((0, 0, 0), (220, 40, 40), (40, 200, 60), (50, 80, 230), (230, 220, 40), (170, 60, 200))
ADE20K_CLASSES = (1, 3, 5, 13, 20, 150)  # values of SHAPES in the small archive: wall, sky, tree, person, chair, flag
_ADE20K_NAMES = {
    1: "wall", 3: "sky", 5: "tree", 8: "bed ", 9: "windowpane, window ", 13: "person, individual, someone", 20: "chair",
    2: "building, edifice", 150: "flag",
}  # fmt: skip


def shapes_on_photograph(number: int, classes: int = 4, largest: int = 96) -> tuple[Image.Image, np.ndarray]:
    """A photograph with one to four shapes, and its map, uint8 (H, W): 0 outside of them, else the shape's class."""
    image, numbers = photograph(number, largest), np.random.default_rng(number)
    label_map = Image.new("L", image.size)
    pixels = np.asarray(image).astype(np.float32)
    for _ in range(numbers.integers(1, 5)):
        label = int(numbers.integers(1, classes))
        width, height = (int(side * numbers.uniform(0.2, 0.6)) + 1 for side in image.size)
        left = int(numbers.integers(-width // 4, image.width))
        top = int(numbers.integers(-height // 4, image.height))
        draw = ImageDraw.Draw(label_map)
        (draw.ellipse if number % 2 else draw.rectangle)((left, top, left + width, top + height), fill=label)
    labels = np.asarray(label_map)
    tints = np.array(_TINTS, np.float32)[labels]
    pixels = np.where(labels[:, :, None] > 0, 0.25 * pixels + 0.75 * tints, pixels)
    return Image.fromarray(pixels.round().astype(np.uint8)), labels


def png(labels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(labels), "PNG")


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def masked_files(count: int, classes: int = 4, largest: int = 96, start: int = 0) -> dict[str, bytes]:
    """images/N.jpg, masks/N.png and classes.txt. In each third mask the first row has no class (255)."""
    files = {"classes.txt": "".join(f"{name}\n" for name in SHAPES[:classes]).encode()}
    for number in range(start, start + count):
        image, labels = shapes_on_photograph(number, classes, largest)
        if number % 3 == 0:
            labels = labels.copy()
            labels[0] = 255
        files[f"images/{number:04d}.jpg"] = encoded(image, quality=90)
        files[f"masks/{number:04d}.png"] = png(labels)
    return files


def write_masked_folder(directory: Path, count: int, **options: int) -> Path:
    """See `masked_files`."""
    return write_files(directory, masked_files(count, **options))


def ade20k_files(training: int, validation: int, largest: int = 96) -> dict[str, bytes]:
    """As ADEChallengeData2016: 150 classes of which six occur, and value 0 for what has none."""
    rows = [f"{n} \t0.0{n % 10}\t{n}\t{n}\t{_ADE20K_NAMES.get(n, f'thing {n}, object {n}')}" for n in range(1, 151)]
    files = {
        "objectInfo150.txt": "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]).encode(),
        "sceneCategories.txt": b"ADE_train_00000001 airport_terminal\n",
    }
    values = np.array(ADE20K_CLASSES, np.uint8)
    for part, short, count, start in (("training", "train", training, 0), ("validation", "val", validation, 10**4)):
        for number in range(count):
            image, labels = shapes_on_photograph(start + number, len(values), largest)
            mask = values[labels]
            mask[:, 0] = 0
            name = f"ADE_{short}_{number + 1:08d}"
            files[f"images/{part}/{name}.jpg"] = encoded(image, quality=90)
            files[f"annotations/{part}/{name}.png"] = png(mask)
    return {f"ADEChallengeData2016/{name}": content for name, content in files.items()}


def write_ade20k_zip(path: Path, training: int, validation: int, largest: int = 96) -> Path:
    """See `ade20k_files`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in ade20k_files(training, validation, largest).items():
            archive.writestr(name, content)
    return path
