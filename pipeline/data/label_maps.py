"""Read the label maps of a data file: the class of each pixel, for semantic segmentation."""

from typing import Self

import numpy as np

from pipeline.data.beton import Beton, samples_of
from pipeline.data.maps_file import MapStreams, maps_path
from pipeline.errors import DataError


class LabelMaps:
    """The label maps of an opened data file, memory-mapped. Threads may share it.

    `dtype` is uint8 for up to 255 classes, and uint16 for more. `ignored` is the label of pixels without a class.
    """

    def __init__(self, streams: MapStreams, sizes: np.ndarray) -> None:
        self._streams, self._sizes = streams, sizes
        self.dtype, self.ignored = streams.dtype, streams.ignored

    @classmethod
    def open(cls, beton: Beton) -> Self:
        """Open the label maps of a file that `open_beton` returned.

        Raises:
            DataError: if the file has none, or they differ from the side-car.
        """
        if beton.maps is None:
            raise DataError(
                f"{beton.path} has no label maps, which segmentation needs; make a file that has them:"
                f" `fcmae prepare maps IMAGES MASKS OUT.beton`"
            )
        streams = MapStreams(maps_path(beton.path), beton.maps, beton.samples, len(beton.classes))
        images = samples_of(beton)["f0"]
        return cls(streams, np.stack([images["height"], images["width"]], 1).astype(np.int64))

    def __len__(self) -> int:
        return len(self._streams)

    def map(self, sample: int) -> np.ndarray:
        """Return the label of each pixel of a sample's image, (H, W) of `dtype`, read-only. Releases the GIL.

        Raises:
            DataError: if its bytes are damaged.
        """
        height, width = self._sizes[sample].tolist()
        return self._streams.read(sample, height, width)
