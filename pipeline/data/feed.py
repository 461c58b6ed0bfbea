"""What the trainer iterates over: this rank's micro-batches, a function of (seed, step, world size) and the file."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.beton import Beton
from pipeline.data.decode import EvaluationPlan, TrainingPlan
from pipeline.data.loader import ImageLoader, Producer
from pipeline.data.order import evaluation_order, ids_of, rank_slots, train_order


@dataclass(frozen=True)
class Batch:
    """Images and what they are, in memory of their own (pinned where CUDA is available)."""

    images: Tensor  # (n, 3, S, S) uint8, channels last in memory
    labels: Tensor  # (n,) int64
    ids: Tensor  # (n,) int64: sample ids, that is places in the file
    epoch: int
    slots: tuple[int, ...]  # the global numbers of the whole slots inside, in order; none in evaluation
    valid: Tensor  # (n,) bool: False marks an image that only fills an evaluation batch


class TrainFeed:
    """Training images of one rank, step by step, for any number of epochs.

    Each step has `slots` slots of `slot_size` images; this rank has the slots rank, rank + world_size, ... and gets
    them in micro-batches of `slots_per_micro_batch` whole slots (the last of a step may hold fewer).
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
        batches_ahead: int = 2,
    ) -> None:
        self.beton = beton
        self._seed, self._slots, self._global_batch = seed, slots, slots * slot_size
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds = timeout_seconds
        self.steps_per_epoch = beton.samples // self._global_batch
        if self.steps_per_epoch == 0:
            train_order(seed, 0, beton.samples, self._global_batch)  # raises
        own = rank_slots(np.empty((0, self._global_batch)), slots, rank, world_size).shape[1]
        self._slots_per_batch = min(slots_per_micro_batch, own)
        self._loader = ImageLoader(
            beton,
            image_size=image_size,
            plan=TrainingPlan(seed, image_size, crop_scale, crop_ratio, flip_probability),
            batch_size=self._slots_per_batch * slot_size,
            workers=workers,
            batches_ahead=batches_ahead,
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
            self._producer = Producer(self._loader, self._work(step), self._timeout_seconds)
        self._next_step = -1
        for _ in range(self._batches_per_step):
            images, labels, ids, epoch, slots = next(self._producer)
            yield _own_batch(images, labels, ids, epoch, slots, np.ones(len(ids), bool))
        self._next_step = step + 1

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
                order = train_order(self._seed, epoch, self.beton.samples, self._global_batch)
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
    Errors: as in TrainFeed.
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
        batches_ahead: int = 2,
    ) -> None:
        self.beton = beton
        ids, valid = evaluation_order(beton.samples, batch_size, world_size)
        self._ids, self._valid = ids[:, rank], valid[:, rank]
        self._timeout_seconds = timeout_seconds
        self._loader = ImageLoader(
            beton,
            image_size=image_size,
            plan=EvaluationPlan(image_size, crop_pct),
            batch_size=batch_size,
            workers=workers,
            batches_ahead=batches_ahead,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Batch]:
        work = ((0, ids, valid) for ids, valid in zip(self._ids, self._valid, strict=True))
        producer = Producer(self._loader, work, self._timeout_seconds)
        try:
            for images, labels, ids, epoch, valid in producer:
                yield _own_batch(images, labels, ids, epoch, (), valid)
        finally:
            producer.close()


def _own_batch(
    images: np.ndarray, labels: np.ndarray, ids: np.ndarray, epoch: int, slots: tuple[int, ...], valid: np.ndarray
) -> Batch:
    own = torch.empty(images.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    np.copyto(own.numpy(), images)  # torch would wake its thread pool for this
    return Batch(
        images=own.permute(0, 3, 1, 2),
        labels=torch.from_numpy(labels[:, 0].copy()),
        ids=torch.from_numpy(ids.copy()),
        epoch=epoch,
        slots=slots,
        valid=torch.from_numpy(valid.copy()),
    )
