"""All contact with FFCV: its file reader, pipeline graph and batch-producing thread, less what goes wrong in them.

What is replaced, and why (FFCV 1.0.2):
- its reader copies metadata and allocation table into memory and builds two dictionaries over all samples (0.5 kB per
  sample and process): here both tables stay in the file's memory map, shared by all processes of a node;
- its pipelines are compiled anew in each process (4 to 6 s): ours call compiled code that is cached on disk;
- an exception in its thread leaves the consumer waiting for ever: here it is raised in the consumer;
- it sets torch's thread count, at import, in the constructor and in its thread: here that is left alone;
- its epoch's length is that of the first epoch: here a producer runs through any work it is given;
- its thread decodes inside a CUDA stream, and on leaving that makes GPU 0 its own, where every rank of a machine then
  has a context of some hundred MB, as has a process that was told to stay on the CPU: here no GPU is touched.
"""

import atexit
import logging
import queue
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numba.typed
import numpy as np
import torch

from pipeline.data.beton import ALLOCATION, HEADER, SAMPLE, Beton, checksums_of, samples_of
from pipeline.data.crops import Plan
from pipeline.data.decode import CHANGED, ImageDecoder, describe_status
from pipeline.data.image_checksum import mark_changed
from pipeline.errors import DataError, DataTimeoutError


@contextmanager
def _harmless_import() -> Iterator[None]:
    """FFCV's import sets torch's thread count and compiles a numba dictionary of two entries, which takes 3 s."""
    threads, compiled = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = compiled
        torch.set_num_threads(threads)


with _harmless_import():
    from ffcv.loader import Loader, epoch_iterator
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.operation import Operation
    from ffcv.reader import Reader

epoch_iterator.IS_CUDA = False
_log = logging.getLogger(__name__)
_live: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread inside compiled code at interpreter exit could abort the process."""
    for producer in list(_live):
        producer.close()


class _MappedReader(Reader):
    def read_metadata(self) -> None:
        offset = HEADER.itemsize + self.field_descriptors.nbytes
        self.metadata = np.asarray(np.memmap(self._fname, SAMPLE, "r", offset, (int(self.num_samples),)))

    def read_allocation_table(self) -> None:
        table = np.memmap(self._fname, ALLOCATION, "r", int(self.header["alloc_table_ptr"]))
        self.alloc_table = np.asarray(table)


class _MappedFile:
    """FFCV's memory manager and its context in one: the file as bytes, and each sample's allocation."""

    def __init__(self, reader: Reader) -> None:
        self.state = np.asarray(np.memmap(reader.file_name, np.uint8, "r")), reader.alloc_table

    def schedule_epoch(self, batches: Any) -> "_MappedFile":
        return self

    def start_batch(self, batch: int) -> None: ...

    def __enter__(self) -> "_MappedFile":
        return self

    def __exit__(self, *error: object) -> None: ...


class _Images(Operation):
    """Sample ids to uint8 (n, size, size, 3). The producer sets `epoch` before each batch and reads `status` after."""

    def __init__(self, beton: Beton, image_size: int, plan: Plan, workers: int) -> None:
        super().__init__()
        self.beton, self.image_size, self.plan, self.epoch = beton, image_size, plan, 0
        self.samples = samples_of(beton)
        largest = 3 * beton.max_height * beton.max_width if beton.jpeg_samples else 0
        self.decoder = ImageDecoder(workers, largest)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (self.image_size, self.image_size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self):
        return self._decode

    def _decode(self, ids: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple) -> np.ndarray:
        self.status = self.decode(ids, out, metadata, storage)
        return out

    def decode(self, ids: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple) -> np.ndarray:
        """Fills `out` and returns each image's status."""
        file, table = storage
        images, table = metadata[ids], table[ids]
        heights, widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        plan = self.plan(self.epoch, ids, heights, widths)
        places, sizes = table["ptr"].astype(np.int64), table["size"].astype(np.int64)
        modes = images["mode"].astype(np.int64)
        status = self.decoder(file, places, sizes, modes, plan, heights, widths, out)
        mark_changed(file, places, sizes, checksums_of(self.samples, ids), status, CHANGED)
        return status


class _Labels(Operation):
    """Sample ids to int64 (n, 1)."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        state = replace(previous_state, jit_mode=True, shape=(1,), dtype=np.dtype("<i8"))
        return state, AllocationQuery((1,), np.dtype("<i8"))

    def generate_code(self):
        def copy(ids: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple) -> np.ndarray:
            out[:, 0] = metadata[ids]
            return out

        return copy


class ImageLoader(Loader):
    """FFCV's Loader over a checked file, for any number of producers one after another."""

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        plan: Plan,
        batch_size: int,
        workers: int,
        batches_ahead: int,
        skip_damaged: bool = False,
        substitutes: np.ndarray | None = None,
    ) -> None:
        self.skip_damaged = skip_damaged
        self.substitutes = substitutes
        self.batch_size, self.num_workers, self.batches_ahead = batch_size, workers, batches_ahead
        self.beton = beton
        self.reader = _MappedReader(beton.path)
        self.memory_manager = _MappedFile(self.reader)
        self.images = _Images(beton, image_size, plan, workers)
        specs = {"image": PipelineSpec("image", self.images), "label": PipelineSpec("label", _Labels())}
        self.graph = Graph(specs, self.reader.handlers, {"image": 0, "label": 1}, self.reader.metadata, None)
        Compiler.set_enabled(False)
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    def replace_damaged(self, ids: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """What the batch holds after each damaged image has given its place to the next whole one of the file.

        Returns the ids that are now in the batch, and the places where they are others. Errors: DataError naming the
        sample, unless damaged ones are to be skipped; when the whole file is damaged.
        """
        places = np.flatnonzero(self.images.status).tolist()
        if not places:
            return ids, []
        now, storage = ids.copy(), self.memory_manager.state
        for place in places:
            what = f"sample {ids[place]} of {self.beton.path} {describe_status(self.images.status[place])}"
            if not self.skip_damaged:
                raise DataError(f"{what}; copy or prepare it again, or set data.on_damaged to skip")
            one = slice(place, place + 1)
            for sample in self._following(ids[place]):
                now[place] = sample
                if not self.images.decode(now[one], images[one], self.reader.metadata["f0"], storage).any():
                    break
            else:
                raise DataError(f"no image of {self.beton.path} is whole; copy or prepare it again")
            labels[place] = self.reader.metadata["f1"][now[place]]
            _log.warning("%s; sample %d takes its place", what, now[place])
        return now, places

    def _following(self, sample: int) -> Iterator[int]:
        """The other images that take part, from the next one of the file on."""
        ids = self.substitutes
        total, start = (self.beton.samples, sample) if ids is None else (len(ids), np.searchsorted(ids, sample))
        for place in range(start + 1, start + total):
            yield place % total if ids is None else ids[place % total]

    def close(self) -> None:
        """Ends the decoder's threads."""
        self.images.decoder.close()


class Producer(epoch_iterator.EpochIterator):
    """A thread that decodes one batch after another into a ring of buffers.

    work: (epoch, ids, tag) per batch, ids int64 of at most the loader's batch size. Iterating yields what `finish`
    makes, in the thread, of (images uint8 (n, S, S, 3), labels int64 (n, 1), ids, epoch, tag, replaced), where
    `replaced` lists the places of damaged images, in which others are; the arrays are overwritten by later batches, so
    it copies what it keeps.
    Errors: whatever went wrong in the thread, raised here; DataError when a batch takes longer than `timeout_seconds`.
    """

    def __init__(
        self,
        loader: ImageLoader,
        work: Iterator[tuple[int, np.ndarray, Any]],
        finish: Callable[..., Any],
        timeout_seconds: float,
    ) -> None:
        self.work, self.finish, self.timeout_seconds = work, finish, timeout_seconds
        super().__init__(loader, [])
        _live.add(self)

    def run(self) -> None:
        try:
            for number, (epoch, ids, tag) in enumerate(self.work):
                self.loader.images.epoch = epoch
                slot = number % (self.loader.batches_ahead + 2)
                images, labels = self.run_pipeline(number, ids, slot, None)
                ids, replaced = self.loader.replace_damaged(ids, images, labels)
                if not self._put(self.finish(images, labels, ids, epoch, tag, replaced)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __next__(self) -> Any:
        waited_seconds = 0.0
        while True:
            try:
                item = self.output_queue.get(timeout=min(1.0, self.timeout_seconds))
                break
            except queue.Empty:
                waited_seconds += min(1.0, self.timeout_seconds)
            path = self.loader.beton.path
            if not self.is_alive() and self.output_queue.empty():
                raise DataError(f"the thread that reads {path} has ended without a word; start again")
            if waited_seconds >= self.timeout_seconds:
                raise DataTimeoutError(f"no batch came from {path} within {self.timeout_seconds:g} s; look at its disk")
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread and frees the ring; may be called twice."""
        self.terminate_event.set()
        if self.is_alive():
            self.join(self.timeout_seconds)
        self.memory_allocations = None
