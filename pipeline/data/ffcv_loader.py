"""All contact with FFCV: its file reader, its pipeline graph and its thread, with their faults worked around.

What this module replaces in FFCV 1.0.2, and why:
- FFCV's reader copies the tables of samples and allocations into memory and builds two dictionaries over all samples
  (0.5 kB per sample and process). Here both tables stay in the file's memory map, which a node's processes share.
- FFCV compiles its pipelines in each process (4 to 6 s). Ours call compiled code that is cached on disk.
- An exception in FFCV's thread leaves the consumer waiting for ever. Here it is raised in the consumer.
- FFCV sets torch's thread count at import, in the constructor and in its thread. Here the count stays as it is.
- FFCV gives every epoch the length of the first. Here a producer takes any number of batches.
- FFCV's thread decodes inside a CUDA stream and leaves a context of some hundred MB on GPU 0, from every rank of a
  machine and even from a process that must stay on the CPU. Here no GPU is touched.
"""

import atexit
import logging
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numba.typed
import numpy as np
import torch

from pipeline.data.batch import batch_label_type
from pipeline.data.beton import ALLOCATION, HEADER, SAMPLE, Beton, checksums_of, samples_of
from pipeline.data.crops import Plan
from pipeline.data.decode import ImageDecoder, StoredImages, compile_decoder, describe_status
from pipeline.data.object_views import ObjectPlan, ObjectTestPlan, ViewFacts, compile_objects
from pipeline.data.scenes import ScenePlan, SceneTestPlan, compile_scenes
from pipeline.data.subset import Subset
from pipeline.errors import DataError, DataTimeoutError
from pipeline.recipe.image_size import height_and_width

BATCHES_AHEAD = 2  # decoded batches that wait for the consumer


@contextmanager
def _harmless_import() -> Iterator[None]:
    """Keep FFCV's import from setting torch's thread count and from compiling a numba dictionary for 3 s."""
    threads, compiled = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = compiled
        torch.set_num_threads(threads)


try:
    with _harmless_import():
        from ffcv.loader import Loader, epoch_iterator
        from ffcv.pipeline import Compiler, PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.operation import Operation
        from ffcv.reader import Reader
except ModuleNotFoundError as error:
    if error.name != "ffcv":
        raise
    raise DataError(
        "FFCV is not installed, and .beton files are read with it; tools/setup/setup.sh installs it on Debian, and"
        " docs/install.md says what it needs elsewhere"
    ) from None

epoch_iterator.IS_CUDA = False
_log = logging.getLogger(__name__)
_live: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads: one inside compiled code at interpreter exit could abort the process."""
    for producer in list(_live):
        producer.close()


class _MappedReader(Reader):
    """FFCV's reader, with its tables in the file's memory map."""

    def read_metadata(self) -> None:
        offset = HEADER.itemsize + self.field_descriptors.nbytes
        self.metadata = np.asarray(np.memmap(self._fname, SAMPLE, "r", offset, (int(self.num_samples),)))

    def read_allocation_table(self) -> None:
        table = np.memmap(self._fname, ALLOCATION, "r", int(self.header["alloc_table_ptr"]))
        self.alloc_table = np.asarray(table)


class _MappedFile:
    """FFCV's memory manager and its context: the bytes of the file, and the allocation of each sample."""

    def __init__(self, reader: Reader) -> None:
        self.state = np.asarray(np.memmap(reader.file_name, np.uint8, "r")), reader.alloc_table

    def schedule_epoch(self, batches: Any) -> "_MappedFile":
        return self

    def start_batch(self, batch: int) -> None: ...

    def __enter__(self) -> "_MappedFile":
        return self

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class Views:
    """What a plan makes of a batch of N images: their views, and what belongs to these."""

    images: torch.Tensor  # uint8 (N, H, W, 3)
    label_maps: torch.Tensor | None  # (N, H, W), of segmentation alone; see Batch
    facts: ViewFacts | None  # of detection alone

    def one(self, place: int) -> "Views":
        """Return the views of one image, which share their memory with these."""
        part = slice(place, place + 1)
        label_maps = None if self.label_maps is None else self.label_maps[part]
        return Views(self.images[part], label_maps, self.facts and self.facts.one(place))


class _Images(Operation):
    """Turn sample ids into views.

    The producer sets `epoch` and `target`, the views of the batch, and takes `wait` afterwards: a function that waits
    until the batch is decoded, and returns the status of each image. So the next batch is planned meanwhile.
    """

    def __init__(self, beton: Beton, plan: Plan | ScenePlan | ObjectPlan, workers: int) -> None:
        super().__init__()
        self.beton, self.plan, self.epoch = beton, plan, 0
        self.samples = samples_of(beton)
        largest = 3 * beton.max_height * beton.max_width if beton.jpeg_samples else 0
        self.decoder = ImageDecoder(workers, largest)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (1, 1, 3), np.dtype("u1")  # not FFCV's memory is used, but that of `target`
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self):
        return self._decode

    def _decode(self, ids: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple) -> np.ndarray:
        self.wait = self.start(self.epoch, ids, self.target, metadata, storage)
        return out

    def empty_views(self, ids: np.ndarray, pinned: bool) -> Views:
        """Return memory for the views of these samples, pinned for copies to a GPU that are asynchronous."""
        plan, label_maps, facts = self.plan, None, None
        height, width = self.samples["f0"][ids[0]][["height", "width"]].item()
        if isinstance(plan, ScenePlan):
            size, map_size = plan.sizes(height, width)
            dtype = batch_label_type(plan.maps.dtype)
            label_maps = torch.empty(len(ids), *map_size, dtype=dtype, pin_memory=pinned)
        elif isinstance(plan, ObjectPlan):
            size, facts = plan.size(height, width), ViewFacts.empty(len(ids))
        else:
            size = height_and_width(plan.image_size)
        return Views(torch.empty(len(ids), *size, 3, dtype=torch.uint8, pin_memory=pinned), label_maps, facts)

    def start(
        self, epoch: int, ids: np.ndarray, views: Views, metadata: np.ndarray, storage: tuple
    ) -> Callable[[], np.ndarray]:
        """Begin to decode the images into `views`; returns `wait`."""
        file, table = storage
        images, table = metadata[ids], table[ids]
        heights, widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        plan = self.plan(epoch, ids, heights, widths)
        places, sizes = table["ptr"].astype(np.int64), table["size"].astype(np.int64)
        modes = images["mode"].astype(np.int64)
        stored = StoredImages(places, sizes, modes, heights, widths, checksums_of(self.samples, ids))
        before = None
        if isinstance(self.plan, ScenePlan):
            before = self.plan.cut_maps(epoch, ids, plan, views.label_maps.numpy())
        if isinstance(self.plan, ObjectPlan):
            views.facts.image_sizes[:] = np.stack([heights, widths], 1)
            views.facts.note_sizes(plan, tuple(views.images.shape[1:3]))
            before = self.plan.cut_objects(ids, plan, views.facts)
        return self.decoder.start(file, stored, plan, views.images.numpy(), before)


class _Labels(Operation):
    """Turn sample ids into labels, int64 (N, 1)."""

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        state = replace(previous_state, jit_mode=True, shape=(1,), dtype=np.dtype("<i8"))
        return state, AllocationQuery((1,), np.dtype("<i8"))

    def generate_code(self):
        def copy(ids: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple) -> np.ndarray:
            out[:, 0] = metadata[ids]
            return out

        return copy


class ImageLoader(Loader):
    """FFCV's Loader over the images of a subset, for any number of producers one after another."""

    def __init__(
        self,
        subset: Subset,
        plan: Plan | ScenePlan | ObjectPlan,
        *,
        batch_size: int,
        workers: int,
        skip_damaged: bool = False,
    ) -> None:
        compile_decoder()  # before the consumer's time-out counts
        if isinstance(plan, ScenePlan):
            compile_scenes(len(subset.beton.classes))
        if isinstance(plan, ObjectPlan):
            compile_objects()
        self.subset, self.skip_damaged = subset, skip_damaged
        self.batch_size, self.num_workers, self.batches_ahead = batch_size, workers, BATCHES_AHEAD
        self.reader = _MappedReader(subset.beton.path)
        self.memory_manager = _MappedFile(self.reader)
        self.images = _Images(subset.beton, plan, workers)
        specs = {"image": PipelineSpec("image", self.images), "label": PipelineSpec("label", _Labels())}
        self.graph = Graph(specs, self.reader.handlers, {"image": 0, "label": 1}, self.reader.metadata, None)
        Compiler.set_enabled(False)
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    def replace_damaged(
        self, status: np.ndarray, epoch: int, ids: np.ndarray, views: Views, labels: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """Put the next undamaged image of the subset in the place of each damaged one of the batch, by its status.

        A whole image that is tested has no replacement of its size, so it becomes black.

        Returns the ids that the batch now holds, and the places that were replaced.

        Raises:
            DataError: naming a damaged sample, unless `skip_damaged`; or if no image of the subset is undamaged.
        """
        path = self.subset.beton.path
        places = np.flatnonzero(status).tolist()
        if not places:
            return ids, []
        new_ids, storage = ids.copy(), self.memory_manager.state
        for place in places:
            damage = f"sample {ids[place]} of {path} {describe_status(status[place])}"
            if not self.skip_damaged:
                raise DataError(f"{damage}; copy or prepare the file again, or set data.on_damaged to skip")
            if isinstance(self.images.plan, SceneTestPlan | ObjectTestPlan):
                views.images[place] = 0
                if views.label_maps is not None:
                    views.label_maps[place] = 0
                _log.warning("%s; it is left out", damage)
                continue
            one, view = slice(place, place + 1), views.one(place)
            for sample in self._following(ids[place]):
                new_ids[place] = sample
                if not self.images.start(epoch, new_ids[one], view, self.reader.metadata["f0"], storage)().any():
                    break
            else:
                raise DataError(f"every image of {path} that takes part is damaged; copy or prepare the file again")
            labels[place] = self.reader.metadata["f1"][new_ids[place]]
            _log.warning("%s; sample %d takes its place", damage, new_ids[place])
        return new_ids, places

    def _following(self, sample: int) -> Iterator[int]:
        """Yield the other sample ids of the subset, in the file's order, from the next one on."""
        ids, total = self.subset.ids, self.subset.samples
        start = sample if ids is None else np.searchsorted(ids, sample)
        for place in range(start + 1, start + total):
            yield place % total if ids is None else ids[place % total]

    def close(self) -> None:
        """End the decoder's threads."""
        self.images.decoder.close()


@dataclass(frozen=True)
class _StartedBatch:
    """A batch that is being decoded."""

    views: Views
    labels: np.ndarray
    ids: np.ndarray
    epoch: int
    tag: Any
    wait: Callable[[], np.ndarray]


class Producer(epoch_iterator.EpochIterator):
    """A thread that has batches decoded, and the iterator over them for the consumer.

    While a batch is decoded the thread plans the next one, so the decoder's threads need not wait for it.

    Args:
        work: (epoch, ids, tag) of each batch; at most the loader's batch size of int64 ids.
        finish: called in the thread with (views, labels int64 (N, 1), ids, epoch, tag, replaced); the iterator yields
            its results. `replaced` lists the places of damaged images that others replaced. The views are tensors of
            the batch's own. The labels are overwritten by later batches, so `finish` must copy them.
        timeout_seconds: how long the consumer waits for a batch.
        pinned: decode into pinned memory, from which a copy to a GPU is asynchronous.

    Raises:
        DataTimeoutError: if a batch takes longer than `timeout_seconds`. Every error of the thread is raised in the
            consumer.
    """

    def __init__(
        self,
        loader: ImageLoader,
        work: Iterator[tuple[int, np.ndarray, Any]],
        finish: Callable[..., Any],
        timeout_seconds: float,
        pinned: bool,
    ) -> None:
        self.work, self.finish, self.timeout_seconds, self.pinned = work, finish, timeout_seconds, pinned
        self._gpu = torch.cuda.current_device() if pinned else None
        super().__init__(loader, [])
        _live.add(self)

    def run(self) -> None:
        started: deque[_StartedBatch | Exception] = deque()
        ahead = 1 if self.loader.num_workers > 1 else 0  # a single worker is this thread
        try:
            if self._gpu is not None:  # a new thread starts on GPU 0, where pinning memory could make a context
                torch.cuda.set_device(self._gpu)
            for batch in self._begin_batches():
                started.append(batch)
                if len(started) > ahead and not self._deliver(started.popleft()):
                    return
            if all(self._deliver(batch) for batch in started):
                self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            for batch in started:  # its file and memory must outlive the decoder's threads
                if isinstance(batch, _StartedBatch):
                    batch.wait()

    def _begin_batches(self) -> Iterator["_StartedBatch | Exception"]:
        """Begin to decode each batch of the work; an error comes last, after the batches before it."""
        images = self.loader.images
        try:
            for number, (epoch, ids, tag) in enumerate(self.work):
                images.epoch, images.target = epoch, images.empty_views(ids, self.pinned)
                _, labels = self.run_pipeline(number, ids, number % (self.loader.batches_ahead + 2), None)
                yield _StartedBatch(images.target, labels, ids, epoch, tag, images.wait)
        except Exception as error:
            yield error

    def _deliver(self, batch: "_StartedBatch | Exception") -> bool:
        """Wait for a batch and queue it; False if the consumer has left. Raises the error that came in its place."""
        if isinstance(batch, Exception):
            raise batch
        ids, replaced = self.loader.replace_damaged(batch.wait(), batch.epoch, batch.ids, batch.views, batch.labels)
        return self._put(self.finish(batch.views, batch.labels, ids, batch.epoch, batch.tag, replaced))

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
            path = self.loader.subset.beton.path
            if not self.is_alive() and self.output_queue.empty():
                raise DataError(f"the thread that reads {path} has ended without an error; start again")
            if waited_seconds >= self.timeout_seconds:
                raise DataTimeoutError(
                    f"no batch came from {path} within {self.timeout_seconds:g} s; check the disk that holds it"
                )
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread and free the ring of buffers; may be called twice."""
        self.terminate_event.set()
        if self.is_alive():
            self.join(self.timeout_seconds)
        self.memory_allocations = None
