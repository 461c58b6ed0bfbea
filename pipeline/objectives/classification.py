"""Classification: cross entropy with random erasing, mixup or cutmix, label smoothing and drop path."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.random_erasing import RandomErasing
from pipeline.models import create_model
from pipeline.objectives.dropping import keep_of_batch
from pipeline.objectives.mixing import draw_mix
from pipeline.objectives.objective import AdaptedWeights, Objective, SummedScores, check_counted, recipe_errors
from pipeline.recipe import ClassificationSettings, StageRecipe
from pipeline.weights.transfer import encoder_to_classifier


class ClassificationObjective(Objective):
    """Fine-tuning, or supervised training from scratch. See `Objective` for the methods."""

    metric = ClassificationSettings.metric

    def __init__(self, recipe: StageRecipe, seed: int):
        super().__init__(recipe, seed)
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
        self._drop_path_rates = model.drop_path_rates(self.settings.drop_path)
        self._head_prefix = model.head_prefix
        return model

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        images = self._normalised(model, batch)
        images = self._erase(images, batch.ids.numpy(), batch.epoch)
        size, dtype = len(images) // len(batch.slots), images.dtype
        mixup, cutmix, smoothing = self.settings.mixup, self.settings.cutmix, self.settings.label_smoothing
        mixes = [
            draw_mix(self.seed, step, slot, (images.shape[2], images.shape[3]), mixup, cutmix) for slot in batch.slots
        ]
        images = torch.cat([mix.apply(slot) for mix, slot in zip(mixes, images.split(size), strict=True)])
        partners = torch.cat([labels.flip(0) for labels in batch.labels.split(size)])
        share = torch.tensor([mix.share for mix in mixes], dtype=dtype).repeat_interleave(size)
        share = share.to(images.device, non_blocking=True)
        keep = keep_of_batch(self.seed, step, batch, self.recipe.batch.slot, self._drop_path_rates, images)
        logits = model(images, keep).to(dtype)
        # Cross entropy is linear in the target, so mixing two losses equals mixing two smoothed targets.
        own = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=smoothing)
        other = F.cross_entropy(logits, partners, reduction="none", label_smoothing=smoothing)
        return (share * own + (1 - share) * other).mean()

    def without_mixing(self) -> "ClassificationObjective":
        plain = copy.copy(self)
        plain.settings = self.settings.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0})
        return plain

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(self._normalised(model, batch)).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        valid = batch.valid.to(logits.device, non_blocking=True)
        return {**count_correct(logits, batch.labels, valid), "loss": (loss * valid).sum()}

    def tally(self) -> SummedScores:
        return SummedScores(self.metrics)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        check_counted(sums)
        return {**accuracies(sums), "loss": sums["loss"] / sums["count"]}

    def paint(self, model: nn.Module, batch: Batch) -> None:
        return None

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        if any(name.startswith("encoder.") for name in weights):
            pretraining_only = ("mask_token", "proj.", "decoder.", "pred.")
            return AdaptedWeights(encoder_to_classifier(weights), pretraining_only, ("norm.", "head."))
        head = (self._head_prefix,) if self.recipe.init.head == "new" else ()
        if any(name.startswith(("norm.", self._head_prefix)) for name in weights):
            return AdaptedWeights(weights, dropped=head, fresh=head)
        # An encoder alone: released FCMAE weights have neither norm nor head.
        return AdaptedWeights(weights, dropped=(), fresh=(*head, "norm."))


def count_correct(logits: Tensor, right: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Count the valid images, and those with a right class ranked first, and among the first five.

    Args:
        logits: (n, classes).
        right: the class of each image, int64 (n,); or bool (n, classes), where several classes may be right.
        valid: bool (n,).
    """
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hit = right.gather(1, ranked) if right.dtype == torch.bool else ranked == right[:, None]
    return {"top1": (hit[:, 0] & valid).sum(), "top5": (hit.any(1) & valid).sum(), "count": valid.sum()}


def accuracies(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the counts of `count_correct` into accuracies in percent."""
    return {name: 100 * sums[name] / sums["count"] for name in ("top1", "top5")}
