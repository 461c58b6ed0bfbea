"""Semantic segmentation: cross entropy of every pixel, with an auxiliary head, dropout and drop path."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.maps_file import label_type
from pipeline.kernels.precision import widen
from pipeline.models.map_sizes import enlarge
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.objectives.dropping import keep_of_batch
from pipeline.objectives.objective import (
    AdaptedWeights,
    Objective,
    Overlays,
    SummedScores,
    check_counted,
    recipe_errors,
)
from pipeline.objectives.sliding_windows import window_logits
from pipeline.randomness import Purpose
from pipeline.recipe import SegmentationSettings, StageRecipe
from pipeline.recipe.image_size import height_and_width
from pipeline.weights.transfer import segmenter_weights


class SegmentationObjective(Objective):
    """Training a head, and the backbone with it, on label maps. See `Objective` for the methods."""

    metric = SegmentationSettings.metric

    def __init__(self, recipe: StageRecipe, seed: int):
        super().__init__(recipe, seed)
        self.ignored = int(label_type(self.settings.classes)[1])

    def build_model(self) -> nn.Module:
        with recipe_errors(self.recipe.name):
            model = create_segmenter(
                self.recipe.model.name, head_options(self.settings), seed=self.seed, **self.recipe.model.options
            )
        self._drop_path_rates = model.drop_path_rates(self.settings.drop_path)
        self._dropout_rates = [self.settings.dropout] * sum(model.dropout_channels)
        return model

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        images, slot = self._normalised(model, batch), self.recipe.batch.slot
        keep = keep_of_batch(self.seed, step, batch, slot, self._drop_path_rates, images)
        dropout = keep_of_batch(self.seed, step, batch, slot, self._dropout_rates, images, Purpose.DROPOUT)
        logits, auxiliary = model(images, keep, None if dropout is None else dropout.T)
        truth = batch.label_maps.long()
        loss = self._pixel_losses(logits, truth).mean()
        if auxiliary is not None:
            loss = loss + self.settings.auxiliary_weight * self._pixel_losses(auxiliary, truth).mean()
        return loss

    def _pixel_losses(self, logits: Tensor, truth: Tensor) -> Tensor:
        """The cross entropy of each pixel, (N, H, W), in at least fp32; 0 where the pixel is ignored.

        mmsegmentation averages over all pixels of a GPU's images, ignored ones too, so each image counts alike here.
        """
        logits = enlarge(widen(logits), (truth.shape[1], truth.shape[2]))
        return F.cross_entropy(logits, truth, ignore_index=self.ignored, reduction="none")

    def _image_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of each pixel of the images of a batch, in their original size: (N, classes, H, W)."""
        scenes, truth = self.recipe.data.scenes, batch.label_maps
        crop = height_and_width(self.recipe.data.image_size) if scenes.test == "window" else None
        images, at_once = self._normalised(model, batch), self.recipe.evaluation.batch
        stride, at_most = self.recipe.model.stride, batch.windows_at_most
        logits = window_logits(model, images, crop, scenes.window_step, at_once, stride, at_most)
        return enlarge(logits, (truth.shape[1], truth.shape[2]))

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits, truth = self._image_logits(model, batch), batch.label_maps.long()
        valid = batch.valid.to(truth.device, non_blocking=True)
        # All pixels of an image that only fills up the batch are ignored.
        truth = torch.where(valid[:, None, None], truth, self.ignored)
        counts = count_confusions(logits.argmax(1), truth, self.settings.classes)
        return {**counts, "loss": self._pixel_losses(logits, truth).sum(), "count": valid.sum()}

    def tally(self) -> SummedScores:
        return SummedScores(self.metrics)

    def metrics(self, sums: Mapping[str, float | Sequence[float]]) -> dict[str, float]:
        check_counted(sums)
        scores = region_metrics(sums["right"], sums["predicted"], sums["present"])
        return {**scores, "loss": sums["loss"] / max(sum(sums["present"]), 1)}

    def paint(self, model: nn.Module, batch: Batch) -> Overlays:
        shown = batch.valid.nonzero().flatten().tolist()
        predicted = self._image_logits(model, batch).argmax(1)
        parts = batch.images, batch.label_maps, predicted
        return Overlays(*([part[n].cpu().numpy() for n in shown] for part in parts))

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        return AdaptedWeights(*segmenter_weights(weights, self._meta_tensors(), self.recipe.init.head == "keep"))


def head_options(settings: SegmentationSettings) -> HeadOptions:
    """The options of `create_segmenter` that a recipe asks for."""
    return HeadOptions(
        classes=settings.classes,
        kind=settings.head,
        channels=settings.channels,
        norm=settings.norm,
        auxiliary_channels=settings.auxiliary_channels if settings.has_auxiliary_head else 0,
        map_norms=settings.extra_norms is not False,
    )


def segmentation_facts(recipe: StageRecipe) -> dict[str, Any]:
    """The entry `segmentation` in the facts of a weights file: what builds the model again, and how it is tested."""
    scenes = recipe.data.scenes
    return {
        "head": asdict(head_options(recipe.objective)),
        "base_size": list(scenes.base_size),
        "test": scenes.test,
        "window_step": scenes.window_step,
    }


def count_confusions(predicted: Tensor, truth: Tensor, classes: int) -> dict[str, Tensor]:
    """Count the labelled pixels of each class: int64 (classes,) by name.

    Of each class, `right` counts the pixels that have it and are predicted to have it, `predicted` those that are
    predicted to have it, and `present` those that have it. Pixels without a class are left out. Sums over images are
    exact on any number of ranks.

    Args:
        predicted, truth: int64 of equal shapes; `classes` and larger numbers in `truth` are no class.
    """
    known = truth < classes
    named = {"right": known & (predicted == truth), "predicted": known, "present": known}
    labels = {"right": truth, "predicted": predicted, "present": truth}
    # Count the other pixels in a place behind the classes: selecting them would make shapes depend on the data.
    counts = {name: torch.where(named[name], labels[name], classes).flatten() for name in named}
    ones = torch.ones_like(truth).flatten()
    return {n: ones.new_zeros(classes + 1).scatter_add_(0, at, ones)[:classes] for n, at in counts.items()}


def region_metrics(right: Sequence[float], predicted: Sequence[float], present: Sequence[float]) -> dict[str, float]:
    """Turn the counts of `count_confusions` into percentages.

    `miou` is a mean over the classes that have pixels in truth or prediction, `mean_accuracy` over those that have
    pixels in the truth; both are 0 without any such class. `constant_miou` is the mIoU of naming all pixels by the most
    frequent class.
    """
    r, p, t = (torch.tensor(counts, dtype=torch.float64) for counts in (right, predicted, present))
    pixels = t.sum()
    return {
        "miou": float((100 * r / (p + t - r)).nanmean().nan_to_num()),
        "mean_accuracy": float((100 * r / t).nanmean().nan_to_num()),
        "pixel_accuracy": float(100 * r.sum() / pixels.clamp(min=1)),
        "constant_miou": float(100 * t.max() / pixels.clamp(min=1) / (t > 0).sum().clamp(min=1)),
    }
