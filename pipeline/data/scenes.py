"""Plan the views of scenes for segmentation, in which an image and its label map move together.

Coordinates: pixel (y, x) covers [y, y + 1) x [x, x + 1), so its centre lies at (y + 0.5, x + 0.5). Image and map are
resized to the same size and cut by the same window. An output pixel's centre lies at the same place of both sources:
the image is filtered around it (`resample`), and the label is that of the source pixel that covers it. So both agree to
half a pixel. OpenCV's nearest neighbour, which most published runs used, takes labels from up to half an output pixel
further to the top and left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pipeline.data.batch import batch_label_type
from pipeline.data.compiled_code import compiled, compiling
from pipeline.data.crops import PLAN
from pipeline.data.decode import BAD_MAP, OK
from pipeline.data.label_maps import LabelMaps
from pipeline.data.maps_file import label_type
from pipeline.data.photometric import draw_distortion
from pipeline.data.randaugment import NOTHING, PHOTOMETRIC
from pipeline.data.windows import resized_to_fit
from pipeline.errors import DataError
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.image_size import ImageSize, height_and_width
from pipeline.recipe.segmentation_settings import SceneSettings

CutMap = Callable[[int], int]
"""Cuts the label map of the image at a place of a batch, and completes the image's row of the plan. Called in a
decoder's thread. Returns OK, or BAD_MAP if the stored map is damaged."""


@dataclass(frozen=True)
class SceneTrainingPlan:
    """Plan training views: a random size, a random window, flip and photometric distortion, then padding.

    The image is resized to the largest size within `scenes.base_size` times a factor from `scenes.ratio`, and a window
    of `image_size` is cut. No class may cover `scenes.class_limit` or more of a window's labelled pixels, and there
    must be two at least: the first of `scenes.crop_tries` windows that fits is taken, else one more (mmsegmentation,
    RandomCrop). Where the resized image is smaller than the window, colour `fill` and the ignored label continue it to
    the right and bottom. All draws are hashes of (seed, epoch, sample id, purpose).
    """

    seed: int
    image_size: ImageSize
    scenes: SceneSettings
    flip_probability: float
    fill: tuple[int, int, int]
    maps: LabelMaps

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return a PLAN row for each image, whose window is at the top left until `cut_maps` has chosen it."""
        plan = np.zeros(len(ids), PLAN)
        plan["height"], plan["width"] = heights, widths
        low, high = self.scenes.ratio
        factors = low + (high - low) * uniform(key(self.seed, epoch, ids, Purpose.SCENE_SIZE), 1)[:, 0]
        for row, factor in zip(plan, factors.tolist(), strict=True):
            sides = [max(int(side * factor), 1) for side in self.scenes.base_size]
            row["full_height"], row["full_width"] = resized_to_fit(int(row["height"]), int(row["width"]), tuple(sides))
        plan["flip"] = uniform(key(self.seed, epoch, ids, Purpose.FLIP), 1)[:, 0] < self.flip_probability
        plan["operations"], plan["fill"] = NOTHING, self.fill
        if self.scenes.photometric:
            plan["operations"][:, 0] = PHOTOMETRIC
            numbers = draw_distortion(self.seed, epoch, ids)
            plan["numbers"][:, 0, : numbers.shape[1]] = numbers
        return plan

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The sizes of a view and of its label map, of an image of that size."""
        return (height_and_width(self.image_size),) * 2

    def cut_maps(self, epoch: int, ids: np.ndarray, plan: np.ndarray, label_maps: np.ndarray) -> CutMap:
        """Return the function that chooses the window of one image, and cuts its label map into `label_maps`."""
        size = label_maps.shape[1:]
        room = np.stack([plan["full_height"], plan["full_width"]], 1) - size
        draws = uniform(key(self.seed, epoch, ids, Purpose.CROP), 2 * (self.scenes.crop_tries + 1))
        draws = draws.reshape(len(ids), self.scenes.crop_tries + 1, 2)
        corners = (draws * (np.maximum(room, 0) + 1)[:, None]).astype(np.int64)

        def cut(place: int) -> int:
            try:
                stored = self.maps.map(int(ids[place]))
            except DataError:
                return BAD_MAP
            row = plan[place]
            rows = nearest_sources(stored.shape[0], int(row["full_height"]))
            columns = nearest_sources(stored.shape[1], int(row["full_width"]))
            chosen = choose_window(
                stored, rows, columns, corners[place], size, self.scenes.class_limit, self.maps.ignored
            )
            row["y0"], row["x0"] = y, x = corners[place, chosen].tolist()
            rows, columns = rows[y : y + size[0]], columns[x : x + size[1]]
            cut_label_map(stored, rows, columns, bool(row["flip"]), self.maps.ignored, label_maps[place])
            return OK

        return cut


@dataclass(frozen=True)
class SceneTestPlan:
    """Plan tests: the whole image at the largest size within `base_size`, and the label map as it is stored."""

    base_size: tuple[int, int]
    maps: LabelMaps

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        plan = np.zeros(len(ids), PLAN)
        plan["height"], plan["width"] = heights, widths
        for row in plan:
            row["full_height"], row["full_width"] = self.sizes(int(row["height"]), int(row["width"]))[0]
        plan["operations"] = NOTHING
        return plan

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return resized_to_fit(height, width, self.base_size), (height, width)

    def cut_maps(self, epoch: int, ids: np.ndarray, plan: np.ndarray, label_maps: np.ndarray) -> CutMap:
        def copy(place: int) -> int:
            try:
                label_maps[place] = self.maps.map(int(ids[place]))
            except DataError:
                return BAD_MAP
            return OK

        return copy


ScenePlan = SceneTrainingPlan | SceneTestPlan


def nearest_sources(source_size: int, full_size: int) -> np.ndarray:
    """Return for each pixel of a line resized to `full_size` the source pixel that covers its centre: int64.

    That is floor((i + 0.5) * source_size / full_size), in exact integers.
    """
    return (2 * np.arange(full_size) + 1) * source_size // (2 * full_size)


@compiled()
def choose_window(label_map, rows, columns, corners, size, limit, ignored):
    """Return the number of the first window in which no class reaches `limit`; the last window is not examined.

    If none of the others fits, it is taken; with a limit of 1 the first one is.

    Args:
        label_map: uint8 or uint16 (H, W).
        rows, columns: the source of each line of the resized map, see `nearest_sources`.
        corners: int64 (N, 2), top and left of each window in the resized map.
        size: height and width of a window.
        limit: share of a window's labelled pixels.
        ignored: the label of pixels without a class.
    """
    last = len(corners) - 1
    if limit >= 1.0:
        return 0
    counts = np.empty(ignored + 1, np.int64)
    for number in range(last):
        top, left = corners[number]
        counts[:] = 0
        for row in rows[top : top + size[0]]:
            line = label_map[row]
            for column in columns[left : left + size[1]]:
                counts[line[column]] += 1
        labelled = counts[:ignored]
        most, total = labelled.max(), labelled.sum()
        if 0 < most < total and most / total < limit:
            return number
    return last


@compiled()
def cut_label_map(label_map, rows, columns, flip, ignored, out):
    """Write the labels at rows x columns to the top left of `out`, mirrored if `flip`; the rest becomes `ignored`."""
    height, width = len(rows), len(columns)
    for y in range(height):
        line, result = label_map[rows[y]], out[y]
        for x in range(width):
            result[width - 1 - x if flip else x] = line[columns[x]]
        result[width:] = ignored
    out[height:] = ignored


@cache
def compile_scenes(classes: int) -> None:
    """Compile the functions that cut label maps of so many classes, or load them: call it before any time-out runs."""
    dtype, ignored = label_type(classes)
    stored, line = np.zeros((1, 1), dtype), np.zeros(1, np.int64)
    stored.flags.writeable = False  # as decompressed maps are; numba compiles for such arrays separately
    with compiling(Path(choose_window.stats.cache_path), f"scenes-{dtype.itemsize}"):
        choose_window(stored, line, line, np.zeros((2, 2), np.int64), (1, 1), 0.5, ignored)
        out = torch.zeros(1, 1, dtype=batch_label_type(dtype)).numpy()
        cut_label_map(stored, line, line, False, ignored, out)
