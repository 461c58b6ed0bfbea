"""FCMAE pre-training: hide cells of each image and predict their pixels."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import randomness
from pipeline.data.batch import Batch
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.objectives.objective import (
    AdaptedWeights,
    Objective,
    Reconstructions,
    SummedScores,
    check_counted,
    recipe_errors,
)
from pipeline.objectives.pixels import denormalise
from pipeline.recipe import FCMAESettings, StageRecipe
from pipeline.recipe.image_size import height_and_width
from pipeline.sparse import VisibleCells, find_layout

# Captions of the drawn reconstructions.
AS_PREDICTED, RESCALED = "as predicted", "as papers draw it"


class FCMAEObjective(Objective):
    """Masked autoencoding. See `Objective` for the methods."""

    metric = FCMAESettings.metric

    def __init__(self, recipe: StageRecipe, seed: int):
        super().__init__(recipe, seed)
        height, width = height_and_width(recipe.data.image_size)
        self._grid = height // recipe.model.stride, width // recipe.model.stride  # cells of an image

    def build_model(self) -> nn.Module:
        with recipe_errors(self.recipe.name):
            encoder = create_model(self.recipe.model.name, num_classes=0, seed=self.seed, **self.recipe.model.options)
            backend = "dense" if self.settings.encoder_leaks else self.settings.encoder_backend
            self._layout = find_layout(backend)
            self._sides = [2**stage for stage in reversed(range(len(encoder.dims)))]  # sites along a side of a cell
            return FCMAE(
                encoder,
                encoder_backend=backend,
                grn_statistics=self.settings.grn_statistics,
                normalize_target=self.settings.normalize_target,
                decoder=self.settings.decoder,
                decoder_dim=self.settings.decoder_dim,
                decoder_depth=self.settings.decoder_depth,
                seed=self.seed,
            )

    def mask(self, batch: Batch) -> Tensor:
        """Draw the mask (n, L) bool, True = hidden."""
        return self._draw_mask(batch.ids, batch.epoch)

    def _draw_mask(self, ids: Tensor, epoch: int) -> Tensor:
        return draw_mask(self.seed, epoch, ids.numpy(), self._grid[0] * self._grid[1], self.settings.mask_ratio)

    def prepare(self, ids: Tensor, epoch: int, device: torch.device) -> VisibleCells:
        visible = VisibleCells(self._draw_mask(ids, epoch), self._grid, device)
        for side in self._sides:
            self._layout.make_tables(visible, side)
        return visible

    def _visible_cells(self, batch: Batch, device: torch.device) -> VisibleCells:
        # Not the mask itself: FSDP moves tensor arguments to the GPU, and reading one there would synchronise.
        if isinstance(batch.prepared, VisibleCells):
            return batch.prepared
        return VisibleCells(self.mask(batch), self._grid, device)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        images = self._normalised(model, batch)
        return model(images, self._visible_cells(batch, images.device)).loss

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images = self._normalised(model, batch)
        # Leave out padding. Every image hides equally many cells, so the loss is a mean over the images.
        count = int(batch.valid.sum())
        if count == len(batch.valid):
            loss = model(images, self._visible_cells(batch, images.device)).loss
        else:
            # Without a valid image compute one all the same: if parameters are sharded, every rank must take part.
            places = batch.valid.nonzero().flatten() if count else torch.zeros(1, dtype=torch.int64)
            images = images.index_select(0, places.to(images.device, non_blocking=True))
            visible = VisibleCells(self._draw_mask(batch.ids[places], batch.epoch), self._grid, images.device)
            with _uncompiled():
                loss = model(images, visible).loss
        return {"loss": loss * count, "count": torch.tensor(float(count))}

    def tally(self) -> SummedScores:
        return SummedScores(self.metrics)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        check_counted(sums)
        return {"loss": sums["loss"] / sums["count"]}

    def paint(self, model: nn.Module, batch: Batch) -> Reconstructions:
        images, mask = self._normalised(model, batch), self.mask(batch)
        with _uncompiled():
            prediction = model(images, VisibleCells(mask, self._grid, images.device)).prediction
        forms = {AS_PREDICTED: False, RESCALED: True} if model.normalize_target else {AS_PREDICTED: True}
        painted = {name: model.paint(images, mask, prediction, rescaled=rescaled) for name, rescaled in forms.items()}
        shown = {name: denormalise(each, self.recipe.channel_statistics) for name, each in painted.items()}
        drawn = {name: each.cpu().numpy() for name, each in shown.items()}
        return Reconstructions(batch.images.cpu().numpy(), mask.cpu().numpy(), drawn)

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        if any(name.startswith("encoder.") for name in weights):
            return AdaptedWeights(weights, dropped=(), fresh=())
        classifier_only, pretraining_only = ("norm.", "head."), ("mask_token", "proj.", "decoder.", "pred.")
        rest = {name: tensor for name, tensor in weights.items() if name.startswith(classifier_only)}
        encoder = {f"encoder.{name}": tensor for name, tensor in weights.items() if name not in rest}
        return AdaptedWeights(encoder | rest, classifier_only, pretraining_only)


def _uncompiled() -> AbstractContextManager:
    """Use no compiled blocks in a `with` block: compiling for a number of images that comes once takes longer."""
    # Without dynamo, which takes a second to import, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def draw_mask(seed: int, epoch: int, ids: np.ndarray, cells: int, ratio: float) -> Tensor:
    """Draw masks (n, cells) bool, True = hidden, by hash of (seed, epoch, sample id).

    int(cells * (1 - ratio)) cells of each image stay visible, at least one; so the official code rounds.
    """
    keys = randomness.key(seed, epoch, ids, randomness.Purpose.MASK)
    rank = randomness.uniform(keys, cells).argsort(1).argsort(1)
    return torch.from_numpy(rank >= max(int(cells * (1 - ratio)), 1))
