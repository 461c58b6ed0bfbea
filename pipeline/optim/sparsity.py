"""Dynamic sparsity: a component that keeps part of the weights at zero and moves the zeros every few steps."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pipeline.distributed.sharded_tensors import fill, local, whole
from pipeline.errors import RecipeError
from pipeline.optim.ema import Component
from pipeline.optim.pruning import grow_mask, hash_places, prune_mask, prune_rate, random_weight_mask
from pipeline.randomness import Purpose, key, text_key
from pipeline.recipe.sections import SparsitySettings

DECOMPOSED = "large_kernel.LoRA"  # in the official names of SLaK's long thin kernels


def maskable_weights(weights: Mapping[str, Tensor], which: str) -> dict[str, Tensor]:
    """Select the weights that may be zero: matrices and convolutions, not biases, norms or factors of channels.

    which: "all", or "decomposed" for SLaK's long thin kernels alone.

    Raises:
        RecipeError: if `which` is "decomposed" and the model has no such kernels.
    """
    selected = {name: w for name, w in weights.items() if name.endswith(".weight") and w.ndim in (2, 4)}
    if which == "decomposed":
        selected = {name: weight for name, weight in selected.items() if DECOMPOSED in name}
        if not selected:
            raise RecipeError(
                f"sparsity.weights is decomposed but this model has no {DECOMPOSED}*; take model slak, or all"
            )
    return selected


class DynamicSparsity(Component):
    """Keeps masked weights and their averages at zero after every update.

    Must come before the EMA's component. A grown weight starts at zero, and its average at the weight's first value.
    Gradients stay dense: gradient growth uses them, and they count in the norm that is reported and clipped.

    All tensors are logical ones (see `sharded_tensors`). When zeros are moved, each layer in turn is gathered whole on
    every rank, so all ranks decide alike. Other steps do not communicate. No step waits for the device but the first
    that moves zeros in an attempt, which counts each layer's weights: moves keep their number.

    Args:
        weights: the live weights by name.
        averages: their moving averages, or an empty mapping.
        moments: the optimizer's moments of each weight.
        gradient: returns the gradient of a weight by name, summed over slots and ranks.
        seed: random masks are hashes of the seed, the step, and the weight's name and place.
        total_steps: of the stage. The last step moves no zeros, because grown weights would not be trained any more.
        accepted: 0-dim bool tensor, False after a step that was skipped.
    """

    name = "sparsity"

    def __init__(
        self,
        settings: SparsitySettings,
        weights: Mapping[str, Tensor],
        averages: Mapping[str, Tensor],
        moments: Mapping[str, Iterable[Tensor]],
        gradient: Callable[[str], Tensor],
        *,
        seed: int,
        total_steps: int,
        accepted: Tensor,
    ):
        self.settings, self._seed, self._total, self._accepted = settings, seed, total_steps, accepted
        self.weights = maskable_weights(weights, settings.weights)
        self._averages = {name: averages[name] for name in self.weights if name in averages}
        self._moments = {name: list(moments[name]) if settings.moments == "zeroed" else [] for name in self.weights}
        self._gradient, self._gradients = gradient, {}
        self._counts: dict[str, int] = {}  # of the weights that are trained, by name
        self._masks = {name: torch.ones_like(w.detach(), dtype=torch.bool) for name, w in self.weights.items()}

    def start(self, densities: Mapping[str, float]) -> None:
        """Start with random masks of these densities, by name of the weight."""
        for name, mask in self._masks.items():
            drawn = random_weight_mask(tuple(mask.shape), densities[name], self._key(name, 0), local(mask).device)
            fill(mask, drawn)
            self._apply(name)

    def start_from_zeros(self) -> None:
        """Start with the zeros of the weights, which a sparse stage has handed on."""
        for name, weight in self.weights.items():
            local(self._masks[name]).copy_(local(weight.detach()) != 0)

    def before_update(self, step: int) -> None:
        if self._is_due(step) and self.settings.growth == "gradient":
            self._gradients = {name: self._gradient(name) for name in self.weights}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if self._is_due(step):
            for name in self.weights:
                self._move(name, step)
        self._gradients = {}
        for name in self.weights:
            self._apply(name)

    def state(self) -> dict[str, Tensor]:
        """Return the masks by name: True where a weight is trained."""
        return self._masks

    def densities(self) -> dict[str, float]:
        """Return the share of each layer's weights that is trained. Collective; waits for the device."""
        return {name: whole(mask).sum().item() / mask.numel() for name, mask in self._masks.items()}

    def _is_due(self, step: int) -> bool:
        every = self.settings.update_every_steps
        return every is not None and step % every == 0 and step < self._total

    def _move(self, name: str, step: int) -> None:
        mask = whole(self._masks[name])
        if name not in self._counts:
            self._counts[name] = int(mask.sum())
        if self._counts[name] == mask.numel():
            return
        rate = prune_rate(step, self._total, self.settings.prune_rate, self.settings.final_prune_rate)
        count = math.ceil(rate * self._counts[name])
        # Where the step was skipped, nothing moves: decided on the device.
        moves = self._accepted.to(mask.device)
        kept = torch.where(moves, prune_mask(whole(self.weights[name].detach()), mask, count), mask)
        fill(self._masks[name], kept)
        self._apply(name)  # so that a weight that is pruned and grown at once starts at zero too
        if self._gradients:
            scores = -whole(self._gradients[name]).abs()
        else:
            scores = hash_places(self._key(name, step), mask.numel(), mask.device)
        fill(self._masks[name], torch.where(moves, grow_mask(kept, count, scores), kept))

    @torch.no_grad()
    def _apply(self, name: str) -> None:
        mask, weight = local(self._masks[name]), local(self.weights[name].detach())
        zeros = ~mask
        for tensor in (weight, *(local(moment) for moment in self._moments[name])):
            tensor.masked_fill_(zeros, 0)
        if name in self._averages:
            average = local(self._averages[name])
            average.masked_fill_(zeros, 0)
            average.copy_(torch.where(mask & (average == 0), weight, average))

    def _key(self, name: str, step: int) -> int:
        return int(key(self._seed, step, text_key(name), Purpose.SPARSITY))
