"""Choose the masks of sparse layers, prune and grow them: pure functions with the same results on any device.

The method is SLaK's (Liu et al. 2022, arXiv 2207.03620): layer-wise densities from SNIP (Lee et al. 2019), then, every
so many steps, the smallest weights of each layer are pruned and as many grown elsewhere. Counts are exact here, while
the released code draws each weight by itself.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.randomness import as_int64, mix64_tensor

Shape = tuple[int, ...]
DENSE_FROM = 0.99  # a layer of this density or more stays dense, as in the released code


def prune_rate(step: int, total_steps: int, first: float, last: float) -> float:
    """Return the share of a layer's weights that is moved after `step`: a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


def snip_densities(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return each layer's share of scores above the threshold that int(total * (1 - sparsity)) of all scores reach.

    scores: |weight * gradient| of each weight.
    """
    all_scores = torch.cat([score.flatten() for score in scores.values()])
    reach = max(int(all_scores.numel() * (1 - sparsity)), 1)
    threshold = all_scores.kthvalue(all_scores.numel() - reach + 1).values
    return {name: (score > threshold).sum().item() / score.numel() for name, score in scores.items()}


def erk_densities(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Return densities in proportion to the sum of a layer's dimensions over their product, at most 1 (RigL).

    Source: Evci et al. 2020, arXiv 1911.11134.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = raw.keys() - dense
        share = (wanted - sum(sizes[n] for n in dense)) / sum(raw[n] * sizes[n] for n in raw if n in rest)
        over = {name for name in rest if raw[name] * share > 1}
        if not over:
            return {name: 1.0 if name in dense else raw[name] * share for name in raw}
        most = max(raw[name] for name in over)
        dense |= {name for name in over if raw[name] == most}


def uniform_densities(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Return the same density for every layer."""
    return dict.fromkeys(shapes, 1 - sparsity)


def random_weight_mask(shape: Shape, density: float, key: int, device: torch.device) -> Tensor:
    """Return a bool tensor with exactly round(density * size) places True, by hash; all True from DENSE_FROM on."""
    count = math.prod(shape)
    if density >= DENSE_FROM:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return mark_smallest(hash_places(key, count, device), round(density * count)).view(shape)


def prune_mask(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return the mask without its `count` smallest weights."""
    magnitudes = torch.where(mask, weight.abs(), torch.inf)
    return mask & ~mark_smallest(magnitudes.flatten(), count).view(mask.shape)


def grow_mask(mask: Tensor, count: int, scores: Tensor) -> Tensor:
    """Return the mask with the `count` places outside it that have the smallest scores, int64 or floating."""
    last = torch.iinfo(torch.int64).max if scores.dtype == torch.int64 else torch.inf
    return mask | mark_smallest(torch.where(mask, last, scores.view(mask.shape)).flatten(), count).view(mask.shape)


def mark_smallest(values: Tensor, count: int) -> Tensor:
    """Return a bool tensor that marks exactly `count` of the 1-D `values`: the smallest, of equal ones the first."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    bound = values.kthvalue(count).values
    below, equal = values < bound, values == bound
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))


def hash_places(key: int, count: int, device: torch.device) -> Tensor:
    """Return `count` different int64 numbers on `device`: number n is a hash of (key, n)."""
    return mix64_tensor(mix64_tensor(torch.arange(count, device=device)) ^ as_int64(key))
