"""Write data files in FFCV's .beton format, each with its side-car; `beton.py` describes and reads them.

FFCV's writer hangs on a bad sample, and its output depends on its workers' timing, so files are written here.
"""

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from pipeline.data.beton import (
    ALLOCATION,
    CHECK,
    FFCV_VERSION,
    FIELD,
    FORMAT_VERSION,
    HEADER,
    JPEG,
    PAGE_BYTES,
    RAW,
    SAMPLE,
    SAMPLES_AT,
    Beton,
    hash_blocks,
    index_sha256,
    sidecar_path,
)
from pipeline.data.image_checksum import checksum
from pipeline.data.maps_file import CompressedMaps, MapsFileWriter, compress_map, maps_path
from pipeline.data.objects_file import AnnotatedObjects, ObjectsFileWriter, objects_path
from pipeline.data.side_file import SideFileWriter
from pipeline.errors import DataError

LONGEST_SIDE = (1 << 16) - 1
_INT_FIELD, _IMAGE_FIELD = 1, 2
STORED = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("label", "<i8"), ("size", "<u8"), ("check", "<u4")]
)
"""An image to be written, for `BetonWriter.add_run`."""


class BetonWriter:
    """Write a .beton file, its side-car, and its label maps or objects if there are any.

    The same calls write the same bytes.

    A context manager: images go to `PATH.partial`, which is renamed to `PATH` when the block ends without an error; the
    side-car is written before. A crash leaves nothing that `open_beton` accepts, and the next writer of that path
    begins the partial file anew.

    Args:
        capacity: the most samples that will be added. Their table comes before the images.
        partial: another path for the unfinished file, on the same disk. It then outlives an error, and a later writer
            may continue it by adding the runs that it holds with `content` None.

    Raises:
        DataError: if the path cannot be written, if another process writes it, if it exists and `overwrite` is not
            set, or if no samples were added.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        capacity: int,
        *,
        settings: Mapping[str, str | int | float | None] | None = None,
        class_descriptions: Mapping[str, str] | None = None,
        overwrite: bool = False,
        partial: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.classes = tuple(classes)
        self.settings = dict(settings or {})
        self.class_descriptions = dict(class_descriptions or {})
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already; remove it, name another file, or pass --overwrite")
        self._samples = np.zeros(capacity, SAMPLE)
        self._sizes = np.zeros(capacity, "<u8")
        self._count = 0
        self._end = -(-(SAMPLES_AT + self._samples.nbytes) // PAGE_BYTES) * PAGE_BYTES
        self._keep_partial = partial is not None
        self._partial = partial or self.path.with_name(self.path.name + ".partial")
        try:
            self._partial.touch()
            self._file = self._partial.open("r+b")
            lock_file(self._file, self.path)
            if not self._keep_partial:
                self._file.truncate(0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}; name another place") from None
        self._written: int | None = None  # end of this writer's last image; None before its first
        self._kept = 0  # end of the images that the partial file must hold already
        self._maps: MapsFileWriter | None = None  # of the label maps, once one is added
        self._objects: ObjectsFileWriter | None = None  # likewise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise DataError(
                f"{self.path} could not be finished: {error.strerror}; make room, or name another place"
            ) from None
        finally:
            self._file.close()
            for _, writer in self._side_writers():
                if writer:
                    writer.close()
            if not self._keep_partial:
                self._partial.unlink(missing_ok=True)

    def add(
        self,
        image: np.ndarray | bytes,
        label: int,
        *,
        size: tuple[int, int] | None = None,
        label_map: np.ndarray | None = None,
        objects: AnnotatedObjects | None = None,
    ) -> None:
        """Add an image: pixels, uint8 (H, W, 3), or the bytes of an RGB or grey JPEG of `size` (height, width).

        Args:
            label_map: the class of each pixel, (H, W) of `label_type`; of all images or of none. `label` is 0 then.
            objects: what is annotated in the image, see `image_objects`; likewise.

        Raises:
            DataError: if the format cannot hold the image.
        """
        if isinstance(image, np.ndarray):
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,), image.shape
            mode, size, content = RAW, image.shape[:2], image.tobytes()
        else:
            assert size is not None
            mode, content = JPEG, image
        if max(size) > LONGEST_SIDE or len(content) > PAGE_BYTES:
            raise DataError(f"an image of {size} pixels and {len(content)} bytes does not fit; limit it by --max-side")
        assert label_map is None or label_map.shape == tuple(size), "a label map has its image's size"
        check = checksum(np.frombuffer(content, np.uint8))
        maps = None if label_map is None else compress_map(label_map, len(self.classes))
        self.add_run(np.array([(mode, size[1], size[0], label, len(content), check)], STORED), content, maps, objects)

    def add_run(
        self,
        images: np.ndarray,
        content: bytes | memoryview | None,
        maps: CompressedMaps | None = None,
        objects: AnnotatedObjects | None = None,
    ) -> None:
        """Add images, STORED (N,), whose bytes follow each other in `content`; None if the partial file holds them.

        Args:
            maps: the label maps of these images; of all images or of none.
            objects: those of these images; likewise.

        Raises:
            DataError: if a file cannot be written, or the partial file lacks images that it should hold.
            IndexError: if there are more images than `capacity`.
        """
        assert (images["label"] >= 0).all()
        assert (images["label"] < len(self.classes)).all()
        sizes = images["size"].tolist()
        places = []
        for size in sizes:
            if self._end % PAGE_BYTES + size > PAGE_BYTES:
                self._end += -self._end % PAGE_BYTES
            places.append(self._end)
            self._end += size
        new = slice(self._count, self._count + len(images))
        if new.stop > len(self._samples):
            raise IndexError(f"{self.path} has room for {len(self._samples)} samples")
        for name in ("mode", "width", "height"):
            self._samples["f0"][name][new] = images[name]
        self._samples["f0"]["data_ptr"][new] = places
        self._samples["f1"][new] = images["label"]
        checks = images["check"].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        self._samples[new].view(np.uint8).reshape(-1, SAMPLE.itemsize)[:, CHECK] = checks
        self._sizes[new] = sizes
        self._count = new.stop
        if content is None:
            self._kept = self._end
        elif places:
            try:
                self._write(places, sizes, memoryview(content))
            except OSError as error:
                raise DataError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            if maps is not None:
                self._maps = self._maps or MapsFileWriter(maps_path(self._partial), len(self.classes))
                self._maps.add(maps)
            if objects is not None:
                assert len(objects.category_ids) == len(self.classes)
                self._objects = self._objects or ObjectsFileWriter(objects_path(self._partial), objects.category_ids)
                self._objects.add(objects)
        except OSError as error:
            raise DataError(f"a side file of {self.path} cannot be written: {error.strerror}") from None
        self._check_side_counts()

    def _side_writers(self) -> tuple[tuple[Path, SideFileWriter | None], ...]:
        """The path of each kind of side file, and its writer if the data has it."""
        return (maps_path(self.path), self._maps), (objects_path(self.path), self._objects)

    def _check_side_counts(self) -> None:
        for path, writer in self._side_writers():
            assert writer is None or writer.count == self._count, f"some images have nothing in {path}"

    def _write(self, places: list[int], sizes: list[int], content: memoryview) -> None:
        if self._written is None:  # drop everything behind the known images of an interrupted writer
            self._check_kept()
            self._file.truncate(places[0])
        done = 0
        for place, size in zip(places, sizes, strict=True):
            if place != self._written:
                self._file.seek(place)
            self._file.write(content[done : done + size])
            done += size
            self._written = place + size

    def sync(self) -> None:
        """Flush all images added so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_kept(self) -> None:
        if os.fstat(self._file.fileno()).st_size < self._kept:
            raise DataError(
                f"{self._partial} is shorter than the {self._kept} bytes written to it; remove {self._partial.parent}"
            )

    def _finish(self) -> None:
        if self._count == 0:
            raise DataError(f"{self.path} would hold no images; check the source")
        self._check_side_counts()
        self._check_kept()
        samples, file = self._samples[: self._count], self._file
        images = samples["f0"]
        table = np.zeros(self._count, ALLOCATION)
        table["sample_id"] = np.arange(self._count)
        table["ptr"] = images["data_ptr"]
        table["size"] = self._sizes[: self._count]
        table_at = self._end + -self._end % PAGE_BYTES
        header = np.array((FFCV_VERSION, 2, PAGE_BYTES, self._count, table_at), HEADER)
        fields = np.zeros(2, FIELD)
        fields["type_id"] = _IMAGE_FIELD, _INT_FIELD
        fields["name"] = b"image", b"label"
        for place, part in ((0, header), (HEADER.itemsize, fields), (SAMPLES_AT, samples), (table_at, table)):
            file.seek(place)
            file.write(part.tobytes())
        file.truncate()
        self.sync()
        file.seek(0)
        sha256, block_sha256 = hash_blocks(file)
        beton = Beton(
            path=self.path,
            format_version=FORMAT_VERSION,
            samples=self._count,
            classes=self.classes,
            samples_per_class=tuple(np.bincount(samples["f1"], minlength=len(self.classes)).tolist()),
            jpeg_samples=int((images["mode"] == JPEG).sum()),
            raw_samples=int((images["mode"] == RAW).sum()),
            max_height=int(images["height"].max()),
            max_width=int(images["width"].max()),
            size_bytes=table_at + table.nbytes,
            sha256=sha256,
            index_sha256=index_sha256(file, header),
            block_sha256=block_sha256,
            settings=self.settings,
            class_descriptions=self.class_descriptions,
            maps=self._maps.finish() if self._maps else None,
            objects=self._objects.finish() if self._objects else None,
        )
        self.path.unlink(missing_ok=True)  # so that an older file never stands beside the new side-car
        for path, writer in self._side_writers():
            if writer:
                writer.publish(path)
            else:
                path.unlink(missing_ok=True)
        sidecar = sidecar_path(self.path)
        draft = sidecar.with_name(sidecar.name + ".partial")
        with draft.open("w") as text:
            # Without side files the side-car is as before there were any.
            absent = {name for name in ("maps", "objects") if getattr(beton, name) is None}
            text.write(beton.model_dump_json(indent=1, exclude=absent) + "\n")
            text.flush()
            os.fsync(text.fileno())
        draft.replace(sidecar)
        self._partial.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def lock_file(file: BinaryIO | int, path: Path) -> None:
    """Lock an open file or folder until it is closed; does nothing on a disk without locks.

    Raises:
        DataError: if another process holds the lock, because it is writing `path`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path} is being written by another process; wait for it, or name another file") from None
    except OSError:
        pass


def refuse_locked(folder: Path, path: Path) -> None:
    """Raise DataError if another process holds the lock of a folder, because it is writing `path`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_file(descriptor, path)
    finally:
        os.close(descriptor)
