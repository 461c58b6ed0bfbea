"""Read prepared images for an evaluation, also where FFCV is not installed: the same batches, to the last bit."""

import importlib.util
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.beton import ALLOCATION, JPEG, Beton, checksums_of, samples_of
from pipeline.data.decode import CHANGED, describe_status
from pipeline.data.image_checksum import mark_changed
from pipeline.data.order import evaluation_order
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.recipe.sections import DataSettings
from tools.predict.evaluation_transform import EvaluationTransform, rgb_pixels
from tools.prepare.image_pixels import AS_LOADER

DECODED_AHEAD = 8  # images


def evaluation_batches(
    part: Subset, transform: EvaluationTransform, batch_size: int, world: World, *, workers: int, timeout_seconds: float
) -> Iterable[Batch]:
    """The batches of an evaluation, decoded by FFCV's threads, or by Pillow where FFCV is not installed.

    Raises:
        DataError: also while iterating, if an image is damaged.
    """
    if importlib.util.find_spec("ffcv") is None:
        return StoredImages(part, transform, batch_size, world, workers=workers)
    from pipeline.data.feed import EvaluationFeed  # it loads FFCV

    settings = DataSettings(
        train=str(part.beton.path),
        image_size=transform.image_size,
        crop_pct=transform.crop_pct,
        timeout_seconds=timeout_seconds,
    )
    return EvaluationFeed(part, settings, batch_size, world, workers=workers)


class StoredImages:
    """The batches of `EvaluationFeed`, decoded by Pillow.

    Raises:
        DataError: while iterating, for a damaged image.
    """

    def __init__(
        self, part: Subset, transform: EvaluationTransform, batch_size: int, world: World, *, workers: int
    ) -> None:
        places, valid = evaluation_order(part.samples, batch_size, world.size)
        self._ids, self._valid = places[:, world.rank], valid[:, world.rank]
        if part.ids is not None:
            self._ids = part.ids[self._ids]
        self._part, self._transform, self._workers = part, transform, workers
        self._stored = StoredPixels(part.beton)
        transform.resized(np.zeros((1, 1, 3), np.uint8))  # compile before there are threads

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._workers, "decode") as pool:
            for ids, valid in zip(self._ids, self._valid, strict=True):
                self._stored.refuse_changed(ids)
                images = torch.stack(list(pool.map(self._pixels, ids.tolist())))
                labels = self._stored.labels(ids)
                if self._part.labels is not None:
                    labels = self._part.labels[labels]
                yield Batch(
                    images=images.permute(0, 3, 1, 2),
                    labels=torch.from_numpy(labels),
                    ids=torch.from_numpy(ids.copy()),
                    epoch=0,
                    slots=(),
                    valid=torch.from_numpy(valid.copy()),
                )

    def _pixels(self, sample: int) -> Tensor:
        """Decode, resize and crop the image of a sample: uint8 (H, W, 3)."""
        return self._transform.resized(self._stored.rgb(sample)).permute(1, 2, 0)


class StoredPixels:
    """The images of a data file in their own size, decoded by Pillow: the pixels that the loader has."""

    def __init__(self, beton: Beton) -> None:
        self._beton, self._samples = beton, samples_of(beton)
        self._file = np.asarray(np.memmap(beton.path, np.uint8, "r"))
        table = beton.size_bytes - beton.samples * ALLOCATION.itemsize
        self._places = np.asarray(np.memmap(beton.path, ALLOCATION, "r", table))

    def refuse_changed(self, ids: np.ndarray) -> None:
        """Compare the bytes of some images, int64 (N,), with their checksums.

        Raises:
            DataError: if an image differs.
        """
        status = np.zeros(len(ids), np.int32)
        starts, sizes = (self._places[name][ids].astype(np.int64) for name in ("ptr", "size"))
        mark_changed(self._file, starts, sizes, checksums_of(self._samples, ids), status, CHANGED)
        if status.any():
            raise DataError(
                f"sample {ids[status.argmax()]} of {self._beton.path} {describe_status(CHANGED)}; copy or prepare"
                " the file again"
            )

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The classes of some images, int64 (N,)."""
        return self._samples["f1"][ids].astype(np.int64)

    def rgb(self, sample: int) -> np.ndarray:
        """Decode the image of a sample: uint8 (H, W, 3)."""
        start, size = (int(self._places[name][sample]) for name in ("ptr", "size"))
        content, image = self._file[start : start + size], self._samples["f0"][sample]
        if image["mode"] == JPEG:
            return rgb_pixels(content.tobytes(), AS_LOADER)
        return content.copy().reshape(int(image["height"]), int(image["width"]), 3)


def images_of_rank(beton: Beton, world: World) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the samples of a file that are this rank's, each with its pixels, uint8 (H, W, 3), a few decoded ahead.

    Raises:
        DataError: if an image is damaged.
    """
    stored, (places, valid) = StoredPixels(beton), evaluation_order(beton.samples, 1, world.size)
    ids = places[:, world.rank, 0][valid[:, world.rank, 0]]
    with ThreadPoolExecutor(max(world.cores() - 1, 1), "decode") as pool:
        for first in range(0, len(ids), DECODED_AHEAD):
            some = ids[first : first + DECODED_AHEAD]
            stored.refuse_changed(some)
            yield from zip(some.tolist(), pool.map(stored.rgb, some.tolist()), strict=True)
