"""Measure the means and deviations of the channels of a data file's images."""

import numpy as np

from pipeline.data.beton import ALLOCATION, samples_of
from pipeline.data.crops import EvaluationPlan
from pipeline.data.decode import ImageDecoder, StoredImages, compile_decoder, describe_status
from pipeline.data.subset import Subset
from pipeline.errors import DataError
from pipeline.randomness import Purpose, key
from pipeline.recipe.channel_statistics import ChannelStatistics

MOST_IMAGES = 10_000  # enough for the fourth decimal of a mean
_SIDE, _BATCH = 64, 64
_GREY = np.array([19595, 38470, 7471])  # Pillow's weights of red, green and blue, in 65536ths
_LEVELS = np.arange(256, dtype=np.int64)


def measure_channels(data: Subset, channels: int = 3, workers: int = 1) -> ChannelStatistics:
    """Measure the images that take part, or 10,000 of them if there are more, chosen by a hash of their number.

    channels: 3, or 1 to measure them as Pillow's mode L shows them.

    Every image counts alike: it is squashed to 64 x 64 pixels. Sums are of integers and the result is rounded to four
    decimals, so the numbers depend on the images alone.

    Raises:
        DataError: naming a damaged image.
    """
    ids = np.arange(data.beton.samples) if data.ids is None else data.ids
    if len(ids) > MOST_IMAGES:
        ids = np.sort(ids[np.argsort(key(0, ids, Purpose.MEASURE), kind="stable")[:MOST_IMAGES]])
    compile_decoder()
    counts = np.zeros((channels, 256), np.int64)
    decoder = ImageDecoder(workers, 3 * data.beton.max_height * data.beton.max_width)
    try:
        for first in range(0, len(ids), _BATCH):
            images = _decoded(data, ids[first : first + _BATCH], decoder)
            if channels == 1:
                images = (images @ _GREY + 0x8000 >> 16)[..., None]
            for channel, of_levels in enumerate(counts):
                of_levels += np.bincount(images[..., channel].reshape(-1), minlength=256)
    finally:
        decoder.close()
    total = counts.sum(1)
    mean = counts @ _LEVELS / total
    variance = counts @ _LEVELS**2 / total - mean**2
    # One level at least, so that images of one colour do not divide by zero.
    deviation = np.maximum(np.sqrt(np.maximum(variance, 0)), 1.0)
    mean, std = (tuple(round(value, 4) for value in (numbers / 255).tolist()) for numbers in (mean, deviation))
    return ChannelStatistics(mean=mean, std=std)


def _decoded(data: Subset, ids: np.ndarray, decoder: ImageDecoder) -> np.ndarray:
    beton = data.beton
    file = np.asarray(np.memmap(beton.path, np.uint8, "r"))
    table = np.memmap(beton.path, ALLOCATION, "r", beton.size_bytes - beton.samples * ALLOCATION.itemsize)[ids]
    rows = samples_of(beton)["f0"][ids]
    heights, widths, modes = (rows[name].astype(np.int64) for name in ("height", "width", "mode"))
    places, sizes = (table[name].astype(np.int64) for name in ("ptr", "size"))
    plan = EvaluationPlan(_SIDE, 1.0)(0, ids, heights, widths)
    out = np.empty((len(ids), _SIDE, _SIDE, 3), np.uint8)
    status = decoder(file, StoredImages(places, sizes, modes, heights, widths), plan, out)
    if damaged := np.flatnonzero(status).tolist():
        place = damaged[0]
        raise DataError(
            f"sample {ids[place]} of {beton.path} {describe_status(status[place])}, so data.normalize cannot be"
            " measured; prepare the file again, or give numbers"
        )
    return out
