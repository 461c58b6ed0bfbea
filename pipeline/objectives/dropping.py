"""Draw which residual branches of a model, or channels of a head, are dropped: by hash, the same on any ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline import randomness
from pipeline.data.batch import Batch
from pipeline.randomness import Purpose


def draw_keep(
    seed: int, step: int, slots: Sequence[int], size: int, rates: Sequence[float], purpose: Purpose = Purpose.DROP_PATH
) -> Tensor | None:
    """Draw factors by hash of (seed, step, slot): 0 where a branch is dropped, else 1 / keep probability.

    Args:
        slots: numbers of the slots.
        size: images of a slot.
        rates: drop rate of each branch or channel.

    Returns:
        (branches, slots * size) float64 on the CPU; None if no branch is ever dropped.
    """
    if not any(rates):
        return None
    keys = randomness.key(seed, step, np.array(slots), purpose)
    draws = randomness.uniform(keys, len(rates) * size).reshape(len(slots), len(rates), size)
    rate = np.array(rates)[None, :, None]
    keep = ((draws >= rate) / (1 - rate)).transpose(1, 0, 2).reshape(len(rates), -1)
    return torch.from_numpy(keep)


def keep_of_batch(
    seed: int,
    step: int,
    batch: Batch,
    slot: int,
    rates: Sequence[float],
    like: Tensor,
    purpose: Purpose = Purpose.DROP_PATH,
) -> Tensor | None:
    """Return `draw_keep` of a batch's images, (branches, N), in the type and on the device of `like`.

    Args:
        batch: whole slots, or this rank's parts of slots. Factors are drawn for whole slots, so parts share them.
        slot: images of a whole slot.
    """
    size = len(batch.images) // len(batch.slots)
    parts = max(slot // size, 1)  # of each slot, if there are more ranks than slots
    keep = draw_keep(seed, step, [number // parts for number in batch.slots], parts * size, rates, purpose)
    if keep is None:
        return None
    own = [index * parts + number % parts for index, number in enumerate(batch.slots)]
    keep = keep.view(len(keep), -1, size)[:, own].flatten(1)
    return keep.to(like.dtype).to(like.device, non_blocking=True)
