"""Who sees which sample when: pure functions, so that nothing about the order is ever saved."""

import numpy as np

from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key, mix64, unmix64

_PART = 1 << 18  # keys hashed at a time, so that what the hash needs beside its result stays in the cache


def train_order(seed: int, epoch: int, samples: int | np.ndarray, global_batch: int) -> np.ndarray:
    """The epoch's permutation of the samples, cut into global batches: uint64 keys of shape (steps, global_batch).

    A key is a hash of the sample's id and nothing else that varies, so it tells the id (`ids_of`), and sorting the keys
    where they lie is the whole permutation: 8 bytes per sample, where a permutation of ids would need 24.
    samples: how many there are, with the ids 0, 1, ...; or the ids of those that take part.
    The samples that do not fill a last global batch are left out, others in each epoch.
    Errors: RecipeError when there are fewer samples than one global batch.
    """
    count = len(samples) if isinstance(samples, np.ndarray) else samples
    if not 0 < global_batch <= count:
        raise RecipeError(f"a global batch of {global_batch} images cannot be drawn from {count}; make it smaller")
    keys = np.empty(count, np.uint64)
    for first in range(0, count, _PART):
        part = slice(first, min(first + _PART, count))
        ids = samples[part] if isinstance(samples, np.ndarray) else np.arange(part.start, part.stop)
        keys[part] = key(seed, epoch, ids, Purpose.ORDER)
    keys.sort()
    steps = count // global_batch
    return keys[: steps * global_batch].reshape(steps, global_batch)


def ids_of(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The sample ids, int64, of keys that `train_order` made for that seed and epoch."""
    before = unmix64(unmix64(keys) ^ mix64(np.uint64([Purpose.ORDER]))) ^ key(seed, epoch)
    return unmix64(before).astype(np.int64)


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
