"""What the trainer iterates over: this rank's micro-batches, a function of (seed, step, world size) and the file."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.beton import Beton
from pipeline.data.crops import EvaluationPlan, TrainingPlan
from pipeline.data.ffcv_loader import ImageLoader, Producer
from pipeline.data.order import evaluation_order, ids_of, rank_slots, train_order
from pipeline.data.randaugment import RandAugment
from pipeline.data.subset import Subset

CPU = torch.device("cpu")


class TrainFeed:
    """Training images of one rank, step by step, for any number of epochs.

    Each step has `slots` slots of `slot_size` images; this rank has the slots rank, rank + world_size, ... and gets
    them in micro-batches of `slots_per_micro_batch` whole slots (the last of a step may hold fewer).
    subset: the images that take part, by default all. device: where the batches go, ahead of their use.
    With `skip_damaged` the next image of the file stands in for a damaged one, and `replaced` counts them.
    Errors: RecipeError when the numbers do not fit each other; DataError while iterating, for a damaged sample and for
    a batch that took longer than `timeout_seconds`.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        seed: int,
        slots: int,
        slot_size: int,
        rank: int,
        world_size: int,
        slots_per_micro_batch: int,
        workers: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip_probability: float,
        timeout_seconds: float,
        rand_augment: RandAugment | None = None,
        skip_damaged: bool = False,
        subset: Subset | None = None,
        device: torch.device = CPU,
        batches_ahead: int = 2,
    ) -> None:
        self.beton, self.replaced = beton, 0
        subset = subset or Subset(beton.samples)
        self._samples = subset.samples if subset.ids is None else subset.ids
        self._delivery = _Delivery(device, subset.labels)
        self._wait_seconds = 0.0
        self._seed, self._slots, self._global_batch = seed, slots, slots * slot_size
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self.steps_per_epoch = subset.samples // self._global_batch
        if self.steps_per_epoch == 0:
            train_order(seed, 0, self._samples, self._global_batch)  # raises
        own = rank_slots(np.empty((0, self._global_batch)), slots, rank, world_size).shape[1]
        self._slots_per_batch = min(slots_per_micro_batch, own)
        self._loader = ImageLoader(
            beton,
            image_size=image_size,
            plan=TrainingPlan(seed, image_size, crop_scale, crop_ratio, flip_probability, rand_augment),
            batch_size=self._slots_per_batch * slot_size,
            workers=workers,
            batches_ahead=batches_ahead,
            skip_damaged=skip_damaged,
            substitutes=subset.ids,
        )
        self._batches_per_step = -(-own // self._slots_per_batch)
        self._producer: Producer | None = None
        self._next_step = -1

    def slots(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of `step` (counted from 0 over all epochs).

        Cheap when it follows the step before, taken whole; any other step, also after `close`, starts the reading anew.
        """
        if self._producer is None or step != self._next_step:
            self.close()
            self._producer = Producer(self._loader, self._work(step), self._finish, self._timeout_seconds)
        self._next_step = -1
        for _ in range(self._batches_per_step):
            began = time.perf_counter()
            sent, replaced = next(self._producer)
            self._wait_seconds += time.perf_counter() - began
            self.replaced += replaced
            yield self._delivery.receive(*sent)
        self._next_step = step + 1

    def take_wait(self) -> float:
        """Seconds spent waiting for batches since the last call, over the world size: the ranks' sum is their mean."""
        waited, self._wait_seconds = self._wait_seconds, 0.0
        return waited / self._world_size

    def _finish(self, images, labels, ids, epoch, slots, replaced) -> tuple:
        return self._delivery.send(images, labels, ids, epoch, slots, np.ones(len(ids), bool)), len(replaced)

    def close(self) -> None:
        """Ends the reading ahead and frees its memory; `slots` may be called again."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def _work(self, first_step: int) -> Iterator[tuple[int, np.ndarray, tuple[int, ...]]]:
        order_epoch = -1
        for step in itertools.count(first_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = train_order(self._seed, epoch, self._samples, self._global_batch)
                # Contiguous, so that only this rank's part stays in memory for the epoch.
                order = np.ascontiguousarray(rank_slots(order, self._slots, self._rank, self._world_size))
                order_epoch = epoch
            numbers = range(self._rank, self._slots, self._world_size)
            for first in range(0, len(numbers), self._slots_per_batch):
                part = slice(first, first + self._slots_per_batch)
                ids = ids_of(order[place, part].reshape(-1), self._seed, epoch)
                yield epoch, ids, tuple(numbers[part])


class EvaluationFeed:
    """All images in file order, each valid once over all ranks; every rank gets equally many batches of equal size.

    Short side to int(image_size / crop_pct) and the centre of it, or squashed to the square when crop_pct is 1.
    A damaged image is not valid, with `skip_damaged`. Errors: as in TrainFeed.
    """

    def __init__(
        self,
        beton: Beton,
        *,
        image_size: int,
        crop_pct: float,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        timeout_seconds: float,
        skip_damaged: bool = False,
        subset: Subset | None = None,
        device: torch.device = CPU,
        batches_ahead: int = 2,
    ) -> None:
        self.beton = beton
        subset = subset or Subset(beton.samples)
        places, valid = evaluation_order(subset.samples, batch_size, world_size)
        self._ids, self._valid = places[:, rank], valid[:, rank]
        if subset.ids is not None:
            self._ids = subset.ids[self._ids]
        self._delivery = _Delivery(device, subset.labels)
        self._timeout_seconds = timeout_seconds
        self._loader = ImageLoader(
            beton,
            image_size=image_size,
            plan=EvaluationPlan(image_size, crop_pct),
            batch_size=batch_size,
            workers=workers,
            batches_ahead=batches_ahead,
            skip_damaged=skip_damaged,
            substitutes=subset.ids,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def _finish(self, images, labels, ids, epoch, valid, replaced) -> tuple:
        valid = valid.copy()
        valid[replaced] = False
        return self._delivery.send(images, labels, ids, epoch, (), valid)

    def __iter__(self) -> Iterator[Batch]:
        work = ((0, ids, valid) for ids, valid in zip(self._ids, self._valid, strict=True))
        producer = Producer(self._loader, work, self._finish, self._timeout_seconds)
        try:
            for sent in producer:
                yield self._delivery.receive(*sent)
        finally:
            producer.close()


class _Delivery:
    """From the loader's buffers to batches on the device: sent off in the loader's thread, received in the trainer's.

    labels: what each label of the file is called here; None keeps them.
    """

    def __init__(self, device: torch.device, labels: np.ndarray | None) -> None:
        self._device, self._labels = device, labels
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        epoch: int,
        slots: tuple[int, ...],
        valid: np.ndarray,
    ) -> tuple[Batch, torch.cuda.Event | None]:
        """A batch of its own, and what says that it has arrived. Copied beside the training, on another stream."""
        pinned = self._stream is not None  # only from pinned memory is a copy asynchronous
        own = torch.empty(images.shape, dtype=torch.uint8, pin_memory=pinned)
        np.copyto(own.numpy(), images)  # torch would wake its thread pool for this
        own_labels = torch.empty(len(ids), dtype=torch.int64, pin_memory=pinned)
        np.copyto(own_labels.numpy(), labels[:, 0] if self._labels is None else self._labels[labels[:, 0]])
        batch = Batch(
            images=own.permute(0, 3, 1, 2),
            labels=own_labels,
            ids=torch.from_numpy(ids.copy()),
            epoch=epoch,
            slots=slots,
            valid=torch.from_numpy(valid.copy()),
        )
        if self._stream is None:
            return batch, None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            images_there = batch.images.to(self._device, non_blocking=True)
            labels_there = batch.labels.to(self._device, non_blocking=True)
            return replace(batch, images=images_there, labels=labels_there), self._stream.record_event()

    def receive(self, batch: Batch, arrived: torch.cuda.Event | None) -> Batch:
        """The batch, for the caller's stream, which waits for the copy; the host does not."""
        if arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(stream)  # its memory belongs to the copying stream until both are through
        return batch
