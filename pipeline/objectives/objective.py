"""The interface of an objective: its model, its loss, its evaluation, and the weights it takes from another stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, Prepared
from pipeline.data.image_objects import ImageObjects
from pipeline.distributed.world import World
from pipeline.errors import DataError, RecipeError
from pipeline.objectives.pixels import normalise
from pipeline.recipe import StageRecipe


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
    """Each (H, W): the class of each pixel."""
    predictions: list[np.ndarray]
    """As `truths`."""


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


class SummedScores:
    """The tally of most scorers: adds up their scores by name, numbers or vectors.

    Args:
        make_metrics: turns the sums over all images and ranks, of vectors as lists, into metrics.
    """

    def __init__(self, make_metrics: Callable[[dict[str, Any]], dict[str, float]]):
        self._make_metrics, self._sums = make_metrics, dict[str, Tensor]()

    def add(self, scores: Mapping[str, Tensor], batch: Batch) -> None:
        for name, value in scores.items():
            value = value.double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self, world: World, should_stop: Callable[[], bool]) -> dict[str, float]:
        sums = self._sums
        total = world.sum(torch.cat([value.cpu().reshape(-1) for value in sums.values()]))
        parts = total.split([value.numel() for value in sums.values()])
        return self._make_metrics(
            {name: part.reshape(sums[name].shape).tolist() for name, part in zip(sums, parts, strict=True)}
        )


class Scorer(ABC):
    """Computes the metrics of an evaluation: an objective is one."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the scores of a batch for the tally to collect.

        For `SummedScores` these are sums over the valid images, and the number of these images under `count`.
        """

    @abstractmethod
    def tally(self) -> Tally:
        """Return what collects the scores of one evaluation and makes metrics of them."""


class Objective(Scorer):
    """The base of one class for each `objective.kind` of the recipe. It knows its model, but no engine and no file."""

    metric: ClassVar[str]
    """The result by which checkpoints are compared: "loss", "top1", "miou" or "box_ap"."""
    parts: Mapping[str, Tensor] = MappingProxyType({})
    """What the loss of the last call is the sum of, detached, by name, for the journal."""

    def __init__(self, recipe: StageRecipe, seed: int):
        self.recipe, self.settings, self.seed = recipe, recipe.objective, seed

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model with its initial weights."""

    def prepare(self, ids: Tensor, epoch: int, device: torch.device) -> Prepared | None:
        """Make what the loss of a micro-batch needs from its ids and the epoch alone. Called after `build_model`, in a
        loader's thread."""
        return None

    def _normalised(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the images of a batch as the model takes them: (N, C, H, W), in at least fp32."""
        return normalise(batch.images, next(model.parameters()).dtype, self.recipe.channel_statistics)

    def _meta_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the model by name, without values."""
        with torch.device("meta"):
            return self.build_model().state_dict()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of the images. All randomness is a hash of the seed, the step and the batch's ids."""

    def smooth_loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return a loss that does not jump where scores tie, by which other code is compared with plain torch."""
        return self.loss(model, batch, step)

    def without_mixing(self) -> "Objective":
        """Return this objective without mixup, cutmix and label smoothing."""
        return self

    @abstractmethod
    def paint(self, model: nn.Module, batch: Batch) -> Reconstructions | Overlays | ObjectOverlays | None:
        """Return what the model makes of images; None if that is no picture. All ranks call it alike."""

    @abstractmethod
    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        """Bring weights of another stage, or released ones, under the names of this stage's model."""


def check_counted(sums: Mapping[str, float | list[float]]) -> None:
    """Check that an evaluation counted an image, of whose sums `metrics` makes means.

    Raises:
        DataError: if it did not, because all images are damaged and left out.
    """
    if not sums["count"]:
        raise DataError("every image of data.validation is damaged; copy or prepare the file again, or name another")


@contextmanager
def recipe_errors(stage: str) -> Iterator[None]:
    """Turn a model's ValueError into a RecipeError: the recipe caused it."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"stage {stage}: {error}") from error
