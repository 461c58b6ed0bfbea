"""Pre-training: hide cells, predict their pixels."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import randomness
from pipeline.data.batch import Batch
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.objectives.objective import AdaptedWeights, recipe_errors
from pipeline.objectives.pixels import denormalise, normalise
from pipeline.recipe import StageRecipe
from pipeline.sparse import VisibleCells


class FCMAEObjective:
    metric = "loss"

    def __init__(self, recipe: StageRecipe, seed: int):
        self.recipe, self.settings, self.seed = recipe, recipe.objective, seed
        self._side = recipe.data.image_size // recipe.model.stride  # in cells

    def build_model(self) -> nn.Module:
        options = self.recipe.model.options
        with recipe_errors(self.recipe.name):
            encoder = create_model(self.recipe.model.name, num_classes=0, seed=self.seed, **options)
            return FCMAE(
                encoder,
                encoder_backend="dense" if self.settings.encoder_leaks else self.settings.encoder_backend,
                grn_statistics=self.settings.grn_statistics,
                normalize_target=self.settings.normalize_target,
                decoder=self.settings.decoder,
                decoder_dim=self.settings.decoder_dim,
                decoder_depth=self.settings.decoder_depth,
                cell=encoder.stride,
                seed=self.seed,
            )

    def mask(self, batch: Batch) -> Tensor:
        """(n, L) bool, True = hidden: a function of (seed, epoch, sample id)."""
        cells = self._side * self._side
        return draw_mask(self.seed, batch.epoch, batch.ids.numpy(), cells, self.settings.mask_ratio)

    def visible(self, mask: Tensor, images: Tensor) -> VisibleCells:
        """What goes to the model: FSDP sends a tensor to the GPU, and each look at the mask would wait for it."""
        return VisibleCells(mask, (self._side, self._side), images.device)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = normalise(batch.images, next(model.parameters()).dtype)
        return model(images, self.visible(self.mask(batch), images)).loss, {}

    def without_mixing(self) -> "FCMAEObjective":
        return self

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        dtype, valid = next(model.parameters()).dtype, batch.valid
        images, mask = normalise(batch.images, dtype), self.mask(batch)
        # Every image hides as many cells as any other, so the loss is a mean over images; padding is cut out.
        count = int(valid.sum())
        # Without a valid image one is computed for nothing: where parameters are shared out, every rank must take part.
        shown = valid if count else torch.arange(len(valid)) == 0
        loss = model(images[shown.to(images.device)], self.visible(mask[shown], images)).loss
        return {"loss": loss * count, "count": torch.tensor(float(count))}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"]}

    def paint(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images, mask = normalise(batch.images, next(model.parameters()).dtype), self.mask(batch)
        prediction = model(images, self.visible(mask, images)).prediction
        return mask, denormalise(model.paint(images, mask, prediction))

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        if any(name.startswith("encoder.") for name in weights):
            return AdaptedWeights(weights, (), ())
        head = {name: tensor for name, tensor in weights.items() if name.startswith(("norm.", "head."))}
        encoder = {f"encoder.{name}": tensor for name, tensor in weights.items() if name not in head}
        return AdaptedWeights(encoder | head, ("norm.", "head."), ("mask_token", "proj.", "decoder.", "pred."))


def draw_mask(seed: int, epoch: int, ids: np.ndarray, cells: int, ratio: float) -> Tensor:
    """(n, cells) bool, True = hidden; int(cells * (1 - ratio)) cells of each image stay visible, at least one."""
    keys = randomness.key(seed, epoch, ids, randomness.Purpose.MASK)
    rank = randomness.uniform(keys, cells).argsort(1).argsort(1)
    return torch.from_numpy(rank >= max(int(cells * (1 - ratio)), 1))
