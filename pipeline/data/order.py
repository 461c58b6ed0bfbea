"""Who sees which sample when: pure functions, so that nothing about the order is ever saved."""

import numpy as np

from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key


def train_order(seed: int, epoch: int, samples: int, global_batch: int) -> np.ndarray:
    """The epoch's permutation of the sample ids, cut into global batches: int64 of shape (steps, global_batch).

    The samples that do not fill a last global batch are left out, others in each epoch.
    Errors: RecipeError when there are fewer samples than one global batch.
    """
    if not 0 < global_batch <= samples:
        raise RecipeError(f"a global batch of {global_batch} images cannot be drawn from {samples}; make it smaller")
    steps = samples // global_batch
    order = np.argsort(key(seed, epoch, np.arange(samples), Purpose.ORDER), kind="stable")
    return order[: steps * global_batch].reshape(steps, global_batch).astype(np.int64, copy=False)


def rank_slots(order: np.ndarray, slots: int, rank: int, world_size: int) -> np.ndarray:
    """The slots `rank, rank + world_size, ...` of each step.

    order: (steps, global_batch), cut into `slots` equal slots per step. Returns (steps, slots / world_size, slot size).
    Errors: RecipeError when the slots do not divide the global batch, or the world size does not divide the slots.
    """
    steps, global_batch = order.shape
    if global_batch % slots:
        raise RecipeError(f"slots={slots} does not divide the global batch of {global_batch} images; change one")
    if slots % world_size:
        fitting = [n for n in range(1, slots + 1) if slots % n == 0]
        near = [max(n for n in fitting if n < world_size), *[n for n in fitting if n > world_size][:1]]
        advice = " or ".join(map(str, near))
        raise RecipeError(f"world size {world_size} does not divide slots={slots}; start {advice} processes")
    return order.reshape(steps, slots, global_batch // slots)[:, rank::world_size]


def evaluation_order(samples: int, batch: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every sample once over all ranks, in equally many batches on each: (ids int64, valid bool).

    Both have the shape (batches, world_size, batch). Places after the last sample repeat the first ones and are not
    valid.
    """
    batches = -(-samples // (batch * world_size))
    places = np.arange(batches * world_size * batch).reshape(batches, world_size, batch)
    return places % samples, places < samples
