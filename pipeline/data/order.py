"""Which rank reads which sample at which step: pure functions, so no order has to be saved."""

import numpy as np

from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key, mix64, unmix64

_PART = 1 << 18  # keys hashed at a time, so that the hash's temporary arrays stay in the processor's cache


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Return the number of whole global batches in an epoch.

    Raises:
        RecipeError: if there are fewer samples than one global batch.
    """
    if not 0 < global_batch <= samples:
        raise RecipeError(f"a global batch of {global_batch} images cannot be drawn from {samples}; make it smaller")
    return samples // global_batch


def train_order(seed: int, epoch: int, samples: int | np.ndarray, global_batch: int) -> np.ndarray:
    """Permute the samples of an epoch and cut them into global batches: uint64 keys (steps, global_batch).

    Each key is a hash of a sample id that `ids_of` turns back into the id. So sorting the keys in place permutes the
    samples with 8 bytes each, where a permutation of ids would need 24.

    samples: how many there are, with the ids 0, 1, ...; or the ids of those that take part. The samples that do not
    fill a last global batch are left out of the epoch; they are others in each epoch.

    Raises:
        RecipeError: if there are fewer samples than one global batch.
    """
    count = len(samples) if isinstance(samples, np.ndarray) else samples
    steps = steps_per_epoch(count, global_batch)
    keys = np.empty(count, np.uint64)
    for first in range(0, count, _PART):
        part = slice(first, min(first + _PART, count))
        ids = samples[part] if isinstance(samples, np.ndarray) else np.arange(part.start, part.stop)
        keys[part] = key(seed, epoch, ids, Purpose.ORDER)
    keys.sort()
    return keys[: steps * global_batch].reshape(steps, global_batch)


def ids_of(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return the sample ids, int64, of keys that `train_order` made for the same seed and epoch."""
    before = unmix64(unmix64(keys) ^ mix64(np.uint64([Purpose.ORDER]))) ^ key(seed, epoch)
    return unmix64(before).astype(np.int64)


def rank_slots(order: np.ndarray, slots: int, rank: int, world_size: int) -> np.ndarray:
    """Return the slots `rank, rank + world_size, ...` of each step: (steps, slots / world_size, slot size).

    order: (steps, global_batch); each global batch is cut into `slots` equal slots.

    Raises:
        RecipeError: if the slots do not divide the global batch, or the world size does not divide the slots.
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
    """Give every sample to one rank, in equally many batches on each: (places int64, valid bool).

    Both have the shape (batches, world_size, batch). Places behind the last sample repeat the first samples and are
    not valid.
    """
    batches = -(-samples // (batch * world_size))
    places = np.arange(batches * world_size * batch).reshape(batches, world_size, batch)
    return places % samples, places < samples
