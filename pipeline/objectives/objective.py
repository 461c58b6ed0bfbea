"""The interface of an objective: its model, its loss, its evaluation, and the weights it takes from another stage."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Prepared
from pipeline.errors import RecipeError


class AdaptedWeights(NamedTuple):
    """Weights of another stage under the names of this stage's model."""

    weights: Mapping[str, Tensor]
    dropped: tuple[str, ...]
    """Prefixes of the weights that this model does not have."""
    fresh: tuple[str, ...]
    """Prefixes of the parameters that keep their initial values."""


class Objective(Protocol):
    """One class for each `objective.kind` of the recipe. It knows its model, but no engine and no file."""

    metric: str
    """The result by which checkpoints are compared: "loss" or "top1"."""

    def build_model(self) -> nn.Module:
        """Build the model with its initial weights."""

    def prepare(self, ids: Tensor, epoch: int, device: torch.device) -> Prepared | None:
        """Make what the loss of a micro-batch needs from its ids and the epoch alone. Called after `build_model`, in a
        loader's thread."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of the images. All randomness is a hash of the seed, the step and the batch's ids."""

    def without_mixing(self) -> "Objective":
        """Return this objective without mixup, cutmix and label smoothing."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the valid images of the batch, and their `count`."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over all images and ranks into metrics."""

    def paint(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the mask (n, L) bool and by caption reconstructions (n, 3, H, W) uint8; None if nothing is hidden."""

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        """Bring weights of another stage, or released ones, under the names of this stage's model."""


@contextmanager
def recipe_errors(stage: str) -> Iterator[None]:
    """Turn a model's ValueError into a RecipeError: the recipe caused it."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"stage {stage}: {error}") from error
