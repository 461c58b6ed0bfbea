"""The micro-batches that a rank reads: a function of (seed, step, world size) and the data file."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.data.batch import Batch, Prepare
from pipeline.data.crops import EvaluationPlan, TrainingPlan
from pipeline.data.ffcv_loader import ImageLoader, Producer, Views
from pipeline.data.label_maps import LabelMaps
from pipeline.data.object_views import ObjectTestPlan, ObjectTrainingPlan
from pipeline.data.objects import Objects
from pipeline.data.order import evaluation_order, ids_of, rank_slots, steps_per_epoch, train_order
from pipeline.data.scenes import SceneTestPlan, SceneTrainingPlan
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.randaugment_settings import RandAugmentSettings
from pipeline.recipe.sections import BatchSettings, DataSettings


class TrainFeed:
    """The training images of one rank, step by step, for any number of epochs.

    Each step has `batch.slots` slots. This rank reads the slots rank, rank + world size, ... in micro-batches of
    `batch.micro_slots` whole slots; the last micro-batch of a step may hold fewer. Batches are copied to the world's
    device ahead of their use.

    Args:
        fill: RGB colour outside of an image, in RandAugment's operations and where views are padded.
        masks: whether objects come with masks, in detection.
        prepare: makes what the objective needs of a micro-batch beside the images, in the loader's thread.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        replaced: damaged images that others have replaced so far, if `settings.on_damaged` is skip.

    Raises:
        RecipeError: if the numbers do not fit each other.
        DataError: if `settings.scenes` are set and the data has no label maps, or `settings.views` and it has no
            objects. While iterating, for a damaged image, or for a batch that takes longer than
            `settings.timeout_seconds`.
    """

    def __init__(
        self,
        data: Subset,
        settings: DataSettings,
        batch: BatchSettings,
        world: World,
        *,
        seed: int,
        workers: int,
        fill: tuple[int, int, int] = IMAGENET.fill,
        masks: bool = True,
        prepare: Prepare | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(data.samples, batch.global_batch)
        self.replaced = 0
        self._samples = data.samples if data.ids is None else data.ids
        self._batch, self._world, self._seed = batch, world, seed
        self._timeout_seconds = settings.timeout_seconds
        self._delivery = _Delivery(world.device, data.labels, prepare)
        self._wait_seconds = 0.0
        own_slots = rank_slots(np.empty((0, batch.global_batch)), batch.slots, world.rank, world.size).shape[1]
        self._slots_per_batch = min(batch.micro_slots, own_slots)
        self._batches_per_step = -(-own_slots // self._slots_per_batch)
        self._loader = ImageLoader(
            data,
            _training_plan(data, settings, seed, fill, masks),
            batch_size=self._slots_per_batch * batch.slot,
            workers=workers,
            skip_damaged=settings.on_damaged == "skip",
        )
        self._producer: Producer | None = None
        self._next_step = -1

    def slots(self, step: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of `step`, counted from 0 over all epochs.

        The step after the last complete one is prefetched. Any other step, and any step after `close`, starts reading
        anew.
        """
        if self._producer is None or step != self._next_step:
            self.close()
            self._producer = Producer(
                self._loader, self._work(step), self._finish, self._timeout_seconds, self._delivery.pinned
            )
        self._next_step = -1
        for _ in range(self._batches_per_step):
            began = time.perf_counter()
            sent, replaced = next(self._producer)
            self._wait_seconds += time.perf_counter() - began
            self.replaced += replaced
            yield self._delivery.receive(*sent)
        self._next_step = step + 1

    def take_wait(self) -> float:
        """Return the seconds spent waiting for batches since the last call, divided by the world size.

        So the sum over ranks is the mean.
        """
        waited, self._wait_seconds = self._wait_seconds, 0.0
        return waited / self._world.size

    def close(self) -> None:
        """Stop prefetching and free its memory; `slots` may be called again."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def _finish(self, views, labels, ids, epoch, slots, replaced) -> tuple:
        return self._delivery.send(views, labels, ids, epoch, slots, np.ones(len(ids), bool)), len(replaced)

    def _work(self, first_step: int) -> Iterator[tuple[int, np.ndarray, tuple[int, ...]]]:
        batch, world, order_epoch = self._batch, self._world, -1
        for step in itertools.count(first_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = train_order(self._seed, epoch, self._samples, batch.global_batch)
                # A contiguous copy, so that only this rank's part stays in memory for the epoch.
                order = np.ascontiguousarray(rank_slots(order, batch.slots, world.rank, world.size))
                order_epoch = epoch
            numbers = range(world.rank, batch.slots, world.size)
            for first in range(0, len(numbers), self._slots_per_batch):
                part = slice(first, first + self._slots_per_batch)
                ids = ids_of(order[place, part].reshape(-1), self._seed, epoch)
                yield epoch, ids, tuple(numbers[part])


def _training_plan(
    data: Subset, settings: DataSettings, seed: int, fill: tuple[int, int, int], masks: bool
) -> TrainingPlan | SceneTrainingPlan | ObjectTrainingPlan:
    if settings.views is not None:
        objects = Objects.open(data.beton)
        return ObjectTrainingPlan(seed, settings.image_size, settings.views, settings.flip, fill, objects, masks)
    if settings.scenes is not None:
        maps = LabelMaps.open(data.beton)
        return SceneTrainingPlan(seed, settings.image_size, settings.scenes, settings.flip, fill, maps)
    augment = settings.rand_augment and RandAugmentSettings.parse(settings.rand_augment)
    return TrainingPlan(
        seed, settings.image_size, settings.crop_scale, settings.crop_ratio, settings.flip, augment, fill
    )


class EvaluationFeed:
    """All images in the file's order, each valid once over all ranks, in equally many batches on every rank.

    The crop follows `settings.image_size` and `settings.crop_pct`. A damaged image is not valid if
    `settings.on_damaged` is skip. `prepare` is as in TrainFeed.

    Raises:
        DataError: while iterating, as in TrainFeed.
    """

    def __init__(
        self,
        data: Subset,
        settings: DataSettings,
        batch_size: int,
        world: World,
        *,
        workers: int,
        prepare: Prepare | None = None,
    ) -> None:
        places, valid = evaluation_order(data.samples, batch_size, world.size)
        self._ids, self._valid = places[:, world.rank], valid[:, world.rank]
        if data.ids is not None:
            self._ids = data.ids[self._ids]
        self._delivery = _Delivery(world.device, data.labels, prepare)
        self._timeout_seconds = settings.timeout_seconds
        self._loader = ImageLoader(
            data,
            self._plan(data, settings),
            batch_size=batch_size,
            workers=workers,
            skip_damaged=settings.on_damaged == "skip",
        )

    def _plan(self, data: Subset, settings: DataSettings) -> EvaluationPlan | SceneTestPlan | ObjectTestPlan:
        return EvaluationPlan(settings.image_size, settings.crop_pct)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        work = ((0, ids, valid) for ids, valid in zip(self._ids, self._valid, strict=True))
        producer = Producer(self._loader, work, self._finish, self._timeout_seconds, self._delivery.pinned)
        try:
            for sent in producer:
                yield self._delivery.receive(*sent)
        finally:
            producer.close()

    def _finish(self, views, labels, ids, epoch, valid, replaced) -> tuple:
        valid = valid.copy()
        valid[replaced] = False
        return self._delivery.send(views, labels, ids, epoch, (), valid)


class _Delivery:
    """Copies batches from the loader's buffers to the device: the loader's thread sends, the trainer's receives.

    Args:
        labels: the new label of each label of the file; None keeps them.
        prepare: see `Prepare`; what it makes is copied with the images.
    """

    def __init__(self, device: torch.device, labels: np.ndarray | None, prepare: Prepare | None) -> None:
        self._device, self._labels, self._prepare = device, labels, prepare
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pinned = self._stream is not None  # a copy is asynchronous only from pinned memory

    def send(
        self,
        views: Views,
        labels: np.ndarray,
        ids: np.ndarray,
        epoch: int,
        slots: tuple[int, ...],
        valid: np.ndarray,
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """Start the copy of a batch to a GPU, on a stream of its own.

        views: in pinned memory for a GPU.

        Returns the batch and, on a GPU, the event of its arrival.
        """
        own_labels = torch.empty(len(ids), dtype=torch.int64, pin_memory=self.pinned)
        np.copyto(own_labels.numpy(), labels[:, 0] if self._labels is None else self._labels[labels[:, 0]])
        facts = views.facts
        batch = Batch(
            images=views.images.permute(0, 3, 1, 2),
            labels=own_labels,
            ids=torch.from_numpy(ids.copy()),
            epoch=epoch,
            slots=slots,
            valid=torch.from_numpy(valid.copy()),
            label_maps=views.label_maps,
            objects=facts and facts.joined(self.pinned),
            view_sizes=facts and torch.from_numpy(facts.sizes),
            image_sizes=facts and torch.from_numpy(facts.image_sizes),
        )
        if self._stream is None:
            return self._with_tables(batch), None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            on_device = self._with_tables(batch.to(self._device))
            return on_device, self._stream.record_event()

    def _with_tables(self, batch: Batch) -> Batch:
        prepared = self._prepare(batch.ids, batch.epoch, self._device) if self._prepare else None
        return replace(batch, prepared=prepared)

    def receive(self, batch: Batch, arrived: torch.cuda.Event | None) -> Batch:
        """Return the batch for use on the caller's stream, which waits for the copy; the host does not wait."""
        if arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in batch.tensors():
                tensor.record_stream(stream)  # the memory must outlive its use here; the copying stream owns it
        return batch
