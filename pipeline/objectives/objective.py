"""What is learned: from a batch to a loss, and what the stage hands on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.errors import RecipeError


class AdaptedWeights(NamedTuple):
    """Weights of another stage, as the model of this stage takes them. Names are prefixes."""

    weights: Mapping[str, Tensor]
    dropped: tuple[str, ...]
    """Of the weights that this model does not have."""
    fresh: tuple[str, ...]
    """Of the parameters that keep their initial values."""


class Objective(Protocol):
    """One per kind in the recipe; knows the model it builds, no engine and no file."""

    metric: str
    """The result's name: "loss" or "top1"."""

    def build_model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the batch's images, and further scalars by name. All randomness is hashed from the batch."""

    def without_mixing(self) -> "Objective":
        """The same on images that are not mixed and labels that are not smoothed: it says what a weight is worth."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch's valid images, and their `count`."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sums over all images and ranks, as metrics."""

    def paint(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(mask (n, L) bool, painted images (n, 3, H, W) uint8), for objectives that reconstruct."""

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        """Bring the weights of the stage before under the names of this stage's model."""


@contextmanager
def recipe_errors(stage: str) -> Iterator[None]:
    """What a model refuses, its recipe has asked for: models raise ValueError, for they know no recipe."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"stage {stage}: {error}") from error
