"""Scenes for the demo of segmentation: its CIFAR-10 photographs on textures, with the class of each pixel.

The cut is visible, so finding an object is easy; naming it is as hard as CIFAR-10. Textures: `brick`, `grass` and
`gravel` of scikit-image, which are in the public domain (CC0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError
from pipeline.randomness import key, text_key, uniform
from tools.prepare.cifar10 import CLASSES, SPLITS, read_photographs
from tools.prepare.coco_annotations import ANNOTATIONS_FILE, CocoAnnotations

SIDE = 128  # pixels of a scene
MOST_OBJECTS = 6
SCALES = 1.0, 2.5  # of the photographs' 32 pixels
TRIES = 10  # of places for an object
MOST_COVERED = 0.25  # share of an object that a later one may hide
TEST_ROWS = 128  # of a texture's 512; the others are for training
SCENES = {"train": 2000, "test": 400}
BACKGROUND = "background"

Draw = Callable[[str], float]
"""A number in [0, 1) for a purpose."""


@dataclass(frozen=True)
class ComposedScene:
    """An image and what its pixels show."""

    image: NDArray[np.uint8]
    """(SIDE, SIDE, 3)"""
    instances: NDArray[np.uint8]
    """(SIDE, SIDE): 0 for the background, n for the object of number n."""
    labels: tuple[int, ...]
    """The class of each object, from object 1 on."""

    @property
    def classes(self) -> NDArray[np.uint8]:
        """(SIDE, SIDE): 0 for the background, 1 + its class for an object."""
        return np.array([0, *(label + 1 for label in self.labels)], np.uint8)[self.instances]


def compose(
    photographs: NDArray[np.uint8], labels: NDArray[np.integer], textures: NDArray[np.uint8], *place: object
) -> ComposedScene:
    """Compose a scene of 1 to 6 photographs. It is a function of its place, such as ("train", 7), and of the pixels.

    Args:
        photographs: (N, 32, 32, 3).
        labels: the class of each, (N,).
        textures: grey, (T, rows, columns), at least SIDE each way.
    """
    image, seen = _background(textures, _draws(*place, "background")), np.zeros((SIDE, SIDE), np.uint8)
    areas: list[int] = []  # of the objects when they were added
    drawn: list[int] = []
    for number in range(1 + int(MOST_OBJECTS * _draws(*place, "count")(""))):
        draw = _draws(*place, number)
        sample = int(draw("photograph") * len(photographs))
        side = round(photographs.shape[1] * (SCALES[0] + (SCALES[1] - SCALES[0]) * draw("scale")))
        cut = _ellipse(side, draw) if draw("shape") < 0.5 else _polygon(side, draw)
        for attempt in range(TRIES):
            y, x = (int(draw(f"{axis} {attempt}") * (SIDE - side + 1)) for axis in "yx")
            window = seen[y : y + side, x : x + side]
            visible = np.bincount(np.where(cut, 0, window).ravel(), minlength=len(areas) + 1)
            visible += np.bincount(seen.ravel(), minlength=len(areas) + 1)
            visible -= np.bincount(window.ravel(), minlength=len(areas) + 1)
            if all(left >= (1 - MOST_COVERED) * area for left, area in zip(visible[1:], areas, strict=True)):
                drawn.append(sample)
                areas.append(int(cut.sum()))
                large = Image.fromarray(photographs[sample]).resize((side, side), Image.Resampling.BICUBIC)
                image[y : y + side, x : x + side][cut] = np.asarray(large)[cut]
                window[cut] = len(drawn)
                break
    return ComposedScene(image, seen, tuple(int(labels[sample]) for sample in drawn))


def _draws(*place: object) -> Draw:
    return lambda purpose: float(uniform(key(text_key("composed scene", *place, purpose)), 1)[0])


def _background(textures: NDArray[np.uint8], draw: Draw) -> NDArray[np.uint8]:
    """A window of a texture in a colour: (SIDE, SIDE, 3)."""
    texture = textures[int(draw("texture") * len(textures))]
    y, x = (int(draw(axis) * (size - SIDE + 1)) for axis, size in zip("yx", texture.shape, strict=True))
    tint = 0.55 + 0.45 * np.array([draw(channel) for channel in ("red", "green", "blue")])
    return (texture[y : y + SIDE, x : x + SIDE, None] * tint).astype(np.uint8)


def _ellipse(side: int, draw: Draw) -> NDArray[np.bool_]:
    """A turned ellipse within a square: (side, side)."""
    dy, dx = _offsets(side)
    angle = np.pi * draw("angle")
    long, short = 0.5 * side, side * (0.35 + 0.15 * draw("ratio"))
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (along / long) ** 2 + (across / short) ** 2 <= 1


def _polygon(side: int, draw: Draw) -> NDArray[np.bool_]:
    """A polygon of 5 to 9 corners around the centre of a square, which sees all of it: (side, side)."""
    corners = 5 + int(5 * draw("corners"))
    turns = [(n + 0.7 * draw(f"turn {n}")) / corners for n in range(corners)]
    radii = [side * (0.36 + 0.14 * draw(f"radius {n}")) for n in range(corners)]
    xs, ys = (np.array([r * f(2 * np.pi * t) for t, r in zip(turns, radii, strict=True)]) for f in (np.cos, np.sin))
    dy, dx = _offsets(side)
    turn = np.arctan2(dy, dx) / (2 * np.pi) % 1
    first = (np.searchsorted(turns, turn, side="right") - 1) % corners  # the corner before the pixel
    after = (first + 1) % corners
    return (xs[after] - xs[first]) * (dy - ys[first]) >= (ys[after] - ys[first]) * (dx - xs[first])


def _offsets(side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The distances of pixels from the centre of a square, down and to the right: (side, side) each."""
    distance = np.arange(side) + 0.5 - side / 2
    return np.broadcast_to(distance[:, None], (side, side)), np.broadcast_to(distance, (side, side))


def write_scenes(archive: Path, directory: Path) -> list[Path]:
    """Write scenes as folders of PNG files, TRAIN and TEST: images, masks (classes) and instances; return the folders.

    classes.txt lists the names of the masks' values, and annotations.json the objects as COCO does. Test scenes hold
    test photographs alone, on other parts of the textures. Scenes that are there already are kept.

    Raises:
        DataError: if scikit-image is missing, or the folder cannot be written.
    """
    textures = _textures()
    folders = [directory / split for split in SPLITS]
    try:
        for split, folder in zip(SPLITS, folders, strict=True):
            if all((folder / name).exists() for name in (ANNOTATIONS_FILE, "classes.txt")):  # written last
                continue
            photographs, labels = read_photographs(archive, split)
            part = textures[:, -TEST_ROWS:] if split == "test" else textures[:, :-TEST_ROWS]
            for name in ("images", "masks", "instances"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            annotations = CocoAnnotations(CLASSES)
            for number in range(SCENES[split]):
                scene = compose(photographs, labels, part, split, number)
                pictures = {"images": scene.image, "masks": scene.classes, "instances": scene.instances}
                for name, pixels in pictures.items():
                    Image.fromarray(pixels).save(folder / name / f"{number:04}.png")
                annotations.add(f"{number:04}.png", scene.instances, scene.labels)
            annotations.write(folder)
            (folder / "classes.txt").write_text("\n".join((BACKGROUND, *CLASSES)) + "\n")
    except OSError as error:
        raise DataError(f"{directory} cannot be written ({error.strerror}); name another folder") from None
    return folders


def _textures() -> NDArray[np.uint8]:
    try:
        from skimage import data
    except ImportError:
        raise DataError(
            "the scenes lie on textures of scikit-image, which is not installed; run `make setup`, or install it"
        ) from None
    return np.stack([data.brick(), data.grass(), data.gravel()])
