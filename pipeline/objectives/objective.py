"""The interface of an objective: its model, its loss, its evaluation, and the weights it takes from another stage."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Prepared
from pipeline.data.image_objects import ImageObjects
from pipeline.distributed.world import World
from pipeline.errors import RecipeError


class AdaptedWeights(NamedTuple):
    """Weights of another stage under the names of this stage's model."""

    weights: Mapping[str, Tensor]
    dropped: tuple[str, ...]
    """Prefixes of the weights that this model does not have."""
    fresh: tuple[str, ...]
    """Prefixes of the parameters that keep their initial values."""


class Reconstructions(NamedTuple):
    """Images whose hidden cells a model has painted."""

    images: np.ndarray
    """(n, 3, H, W) uint8."""
    mask: np.ndarray
    """(n, L) bool, True where a cell is hidden."""
    drawn: dict[str, np.ndarray]
    """By caption, each like `images`."""


class Overlays(NamedTuple):
    """Images with their label maps and the predicted ones; sizes may differ."""

    images: list[np.ndarray]
    """Each (3, h, w) uint8."""
    truths: list[np.ndarray]
    """Each (H, W)."""
    predictions: list[np.ndarray]


class ObjectOverlays(NamedTuple):
    """Images with their annotated objects and the detected ones; sizes may differ."""

    images: list[np.ndarray]
    """Each (3, h, w) uint8; padding has been cut off."""
    truths: list[ImageObjects]
    predictions: list[ImageObjects]


class Tally(Protocol):
    """What an evaluation has collected so far on this rank."""

    def add(self, scores: Mapping[str, Tensor], batch: Batch) -> None:
        """Add what `Objective.evaluate` returned for a batch."""

    def metrics(self, world: World, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return the metrics of all ranks' images; None if the ranks agreed to stop. Collective."""


class Objective(Protocol):
    """One class for each `objective.kind` of the recipe. It knows its model, but no engine and no file."""

    metric: str
    """The result by which checkpoints are compared: "loss", "top1", "miou" or "box_ap"."""

    def build_model(self) -> nn.Module:
        """Build the model with its initial weights."""

    def prepare(self, ids: Tensor, epoch: int, device: torch.device) -> Prepared | None:
        """Make what the loss of a micro-batch needs from its ids and the epoch alone. Called after `build_model`, in a
        loader's thread."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of the images. All randomness is a hash of the seed, the step and the batch's ids.

        An objective whose loss jumps where scores tie also has `smooth_loss`, by which other code is compared with
        plain torch. An objective may have `parts`, detached: what the loss of the last call is the sum of, by name, for
        the journal.
        """

    def without_mixing(self) -> "Objective":
        """Return this objective without mixup, cutmix and label smoothing."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the valid images of the batch, and their `count`. An objective that has a method `tally()`
        instead of `metrics` returns what its `Tally` collects."""

    def metrics(self, sums: Mapping[str, float | list[float]]) -> dict[str, float]:
        """Turn the sums over all images and ranks, of vectors as lists, into metrics."""

    def paint(self, model: nn.Module, batch: Batch) -> Reconstructions | Overlays | ObjectOverlays | None:
        """Return what the model makes of images; None if that is no picture. All ranks call it alike."""

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        """Bring weights of another stage, or released ones, under the names of this stage's model."""


@contextmanager
def recipe_errors(stage: str) -> Iterator[None]:
    """Turn a model's ValueError into a RecipeError: the recipe caused it."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"stage {stage}: {error}") from error
