"""Read images of files, folders, tar archives, Parquet files and URLs for a model; note those that cannot be read."""

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError, UserError
from pipeline.storage.file_names import RECIPE_FILE
from tools.predict.evaluation_transform import EvaluationTransform, rgb_pixels
from tools.prepare.detect import open_source
from tools.prepare.image_files import MOST_PIXELS_SHRUNK, opened_image
from tools.prepare.image_pixels import ReadingSettings, page_count
from tools.prepare.image_source import ByteRanges, Item, Reader, is_image, locate

THUMBNAIL_PIXELS = 192  # longest side: twice what the page shows, for fine displays


class Photographs:
    """The images of some paths, in their order; folders with all folders in them, by name.

    Attributes:
        names: of the images that were read so far; those of a folder or an archive begin with its path. Images of a tar
            of tars, or rows of Parquet files, may have one name: the second one becomes "NAME (2).jpg".
        unreadable: (name, reason) of those that could not be read.
        paged: of the files that hold several pages or frames, of which the first was read.
        thumbnails: data URLs of the images in `names`, if they are wanted.

    Raises:
        DataError: if a path does not exist or holds no images.
    """

    def __init__(self, paths: Sequence[str], thumbnails: bool = False) -> None:
        self.names: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.paged: list[str] = []
        self.thumbnails: list[str] = []
        self._with_thumbnails = thumbnails
        self._items = _with_own_names([item for path in paths for item in _items_of(path)])

    def __len__(self) -> int:
        return len(self._items)

    @property
    def all_names(self) -> list[str]:
        """The names of all images, read or not."""
        return [item.name for item, _ in self._items]

    def batches(
        self, transform: EvaluationTransform, size: int, progress: Callable[[int, int], Any] = lambda done, total: None
    ) -> Iterator[Tensor]:
        """Yield the pixels of the readable images for a model, uint8 (N, 3, H, W), `size` at a time."""
        some: list[Tensor] = []
        for _, rgb in self.pixels(transform.reading, progress):
            some.append(transform.resized(rgb).permute(1, 2, 0))
            if len(some) == size:
                yield torch.stack(some).permute(0, 3, 1, 2)
                some = []
        if some:
            yield torch.stack(some).permute(0, 3, 1, 2)

    def pixels(
        self, reading: ReadingSettings, progress: Callable[[int, int], Any] = lambda done, total: None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and pixels, uint8 (H, W, 3), of each readable image in its own size."""
        for number, (item, reader) in enumerate(self._items, 1):
            try:
                content = _content(item, reader)
                rgb = rgb_pixels(content, reading)
            except DataError as error:
                self.unreadable.append((item.name, str(error).removeprefix("image cannot be read: ")))
            else:
                self.names.append(item.name)
                if _has_pages(content):
                    self.paged.append(item.name)
                if self._with_thumbnails:
                    self.thumbnails.append(_thumbnail(Image.fromarray(rgb)))
                yield item.name, rgb
            progress(number, len(self._items))


def refuse_swapped(weights: str, photos: Sequence[str]) -> None:
    """Raise UserError if the weights are a folder or an image, and what stands behind them is a run or weights."""
    if _is_run(weights) or not (os.path.isdir(weights) or is_image(weights)):
        return
    for path in photos:
        if _is_run(path) or path.endswith((".safetensors", ".pt", ".pth")):
            raise UserError(
                f"{weights} is no run and no file of weights; did you swap it with {path}? Weights come first"
            )


def _is_run(path: str) -> bool:
    return os.path.isfile(os.path.join(path, RECIPE_FILE))


def _items_of(path: str) -> list[tuple[Item, Reader]]:
    fs, place = locate(path)
    if is_image(place) and fs.isfile(place):
        return [(Item(path, 0, (place, 0, None)), ByteRanges(fs))]
    source = open_source(path, unlabelled=True)
    return [(item._replace(name=f"{path.rstrip('/')}/{item.name}"), source.reader) for item in source.items]


def _with_own_names(items: Sequence[tuple[Item, Reader]]) -> list[tuple[Item, Reader]]:
    """Number the images that have the name of another one, because their files and rows would pass for its own."""
    own: dict[tuple, str] = {}
    taken: set[str] = set()
    times: Counter[str] = Counter()
    for item, _ in items:
        name, (stem, ending) = item.name, os.path.splitext(item.name)
        if (item.name, item.place) in own:  # the same image once more
            continue
        while name in taken:
            times[item.name] += 1
            name = f"{stem} ({times[item.name] + 1}){ending}"
        own[item.name, item.place] = name
        taken.add(name)
    return [(item._replace(name=own[item.name, item.place]), reader) for item, reader in items]


def _content(item: Item, reader: Reader) -> bytes:
    if isinstance(item.place, str):
        raise DataError(item.place)
    try:
        return reader.read(item.place)
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None


def _has_pages(content: bytes) -> bool:
    try:
        with opened_image(content, MOST_PIXELS_SHRUNK) as image:
            return page_count(image) > 1
    except Exception:  # decoders raise all kinds of errors for damage behind the first page
        return False


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
