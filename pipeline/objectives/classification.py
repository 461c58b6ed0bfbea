"""Fine-tuning: random erasing, mixup or cutmix inside each slot, label smoothing, drop path."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import randomness
from pipeline.data.batch import Batch
from pipeline.data.random_erasing import RandomErasing
from pipeline.models import create_model
from pipeline.objectives.objective import AdaptedWeights, recipe_errors
from pipeline.objectives.pixels import normalise
from pipeline.recipe import StageRecipe
from pipeline.weights.transfer import encoder_to_classifier


class ClassificationObjective:
    metric = "top1"

    def __init__(self, recipe: StageRecipe, seed: int):
        self.recipe, self.settings, self.seed = recipe, recipe.objective, seed
        self._erase = RandomErasing(seed, recipe.data.erase_probability)

    def build_model(self) -> nn.Module:
        with recipe_errors(self.recipe.name):
            model = create_model(
                self.recipe.model.name,
                num_classes=self.settings.classes,
                head_init_scale=self.settings.head_init_scale,
                seed=self.seed,
                **self.recipe.model.options,
            )
        self._rates = np.array(model.drop_path_rates(self.settings.drop_path))
        self._head = model.head_prefix
        return model

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        dtype, device = next(model.parameters()).dtype, batch.images.device
        images = self._erase(normalise(batch.images, dtype), batch.ids.numpy(), batch.epoch)
        dtype = images.dtype
        size = len(images) // len(batch.slots)
        mixes = [self._mix(step, slot, images.shape[-1]) for slot in batch.slots]
        images = torch.cat([mix.images(x) for mix, x in zip(mixes, images.split(size), strict=True)])
        partners = torch.cat([labels.flip(0) for labels in batch.labels.split(size)])
        share = torch.tensor([mix.share for mix in mixes], dtype=dtype).repeat_interleave(size)
        share = share.to(device, non_blocking=True)
        logits = model(images, self._keep(step, batch.slots, size, dtype, device)).to(dtype)
        # Cross entropy is linear in the target, so mixing two losses is mixing two smoothed targets.
        own = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.settings.label_smoothing)
        other = F.cross_entropy(logits, partners, reduction="none", label_smoothing=self.settings.label_smoothing)
        return (share * own + (1 - share) * other).mean(), {}

    def without_mixing(self) -> "ClassificationObjective":
        found = copy.copy(self)
        found.settings = self.settings.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0})
        return found

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(normalise(batch.images, next(model.parameters()).dtype)).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        valid = batch.valid.to(logits.device)
        return {**count_correct(logits, batch.labels, valid), "loss": (loss * valid).sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {**accuracies(sums), "loss": sums["loss"] / sums["count"]}

    def paint(self, model: nn.Module, batch: Batch) -> None:
        return None

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        if any(name.startswith("encoder.") for name in weights):
            dropped = ("mask_token", "proj.", "decoder.", "pred.")
            return AdaptedWeights(encoder_to_classifier(weights), dropped, ("norm.", "head."))
        head = (self._head,) if self.recipe.init.head == "new" else ()
        if any(name.startswith(("norm.", self._head)) for name in weights):
            return AdaptedWeights(weights, dropped=head, fresh=head)
        return AdaptedWeights(weights, (), (*head, "norm."))  # an encoder alone, as FCMAE weights are released

    def _mix(self, step: int, slot: int, size: int) -> "Mix":
        """The slot's mix-up or cut-mix, by hash of (seed, step, slot)."""
        alphas = {"mixup": self.settings.mixup, "cutmix": self.settings.cutmix}
        kinds = [kind for kind, alpha in alphas.items() if alpha > 0]
        if not kinds:
            return Mix(1.0)
        seed = int(randomness.key(self.seed, step, slot, randomness.Purpose.MIX))
        draw = np.random.Generator(np.random.Philox(key=seed))
        kind = kinds[int(draw.integers(len(kinds)))]
        share = float(draw.beta(alphas[kind], alphas[kind]))
        if kind == "mixup":
            return Mix(share)
        half = int(size * (1 - share) ** 0.5) // 2
        y, x = (int(v) for v in draw.integers(size, size=2))
        box = (max(y - half, 0), min(y + half, size), max(x - half, 0), min(x + half, size))
        return Mix(1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2, box)

    def _keep(
        self, step: int, slots: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Drop-path factors (branches, n), by hash of (seed, step, slot)."""
        if not self._rates.any():
            return None
        keys = randomness.key(self.seed, step, np.array(slots), randomness.Purpose.DROP_PATH)
        draws = randomness.uniform(keys, len(self._rates) * size).reshape(len(slots), len(self._rates), size)
        rates = self._rates[None, :, None]
        keep = ((draws >= rates) / (1 - rates)).transpose(1, 0, 2).reshape(len(self._rates), -1)
        return torch.from_numpy(keep).to(dtype).to(device, non_blocking=True)


def count_correct(logits: Tensor, right: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """How many of the `valid` (n,) images have a right class first, and among the first five.

    right: int64 (n,), each image's class; or bool (n, classes), where several may be right.
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hit = right.gather(1, ranked) if right.dtype == torch.bool else ranked == right[:, None]
    return {"top1": (hit[:, 0] & valid).sum(), "top5": (hit.any(1) & valid).sum(), "count": valid.sum()}


def accuracies(sums: Mapping[str, float]) -> dict[str, float]:
    """In percent."""
    return {name: 100 * sums[name] / sums["count"] for name in ("top1", "top5")}


@dataclass(frozen=True)
class Mix:
    """How a slot's images are mixed with the same images in reverse order: `share` of the own label remains."""

    share: float
    box: tuple[int, int, int, int] | None = None
    """top, bottom, left, right of what is pasted in; None blends whole images."""

    def images(self, x: Tensor) -> Tensor:
        if self.share == 1.0:
            return x
        if self.box is None:
            return x * self.share + x.flip(0) * (1 - self.share)
        top, bottom, left, right = self.box
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
        return mixed
