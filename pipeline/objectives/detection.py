"""Detection: losses of proposals, boxes and masks, averaged within a slot, and COCO's average precision."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import randomness
from pipeline.data.batch import Batch
from pipeline.data.image_objects import ImageObjects
from pipeline.data.objects import Objects
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.models.detections import Detections
from pipeline.models.detector import create_detector
from pipeline.models.detector_options import DetectorOptions
from pipeline.objectives.average_precision import compare_classes, summarise
from pipeline.objectives.detected_objects import Packed, detected_objects, pack_objects, unpack_objects
from pipeline.objectives.dropping import keep_of_batch
from pipeline.objectives.objective import AdaptedWeights, Objective, ObjectOverlays, recipe_errors
from pipeline.randomness import Purpose
from pipeline.recipe import DetectionSettings, StageRecipe
from pipeline.weights.transfer import detector_weights


class DetectionObjective(Objective):
    """Training a detector, and the backbone with it, on boxes and masks. See `Objective` for the methods."""

    metric = DetectionSettings.metric

    def build_model(self) -> nn.Module:
        with recipe_errors(self.recipe.name):
            options, model_options = detector_options(self.recipe), self.recipe.model.options
            model = create_detector(self.recipe.model.name, options, seed=self.seed, **model_options)
        self._drop_path_rates = model.drop_path_rates(self.settings.drop_path)
        return model

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        images, slot = self._normalised(model, batch), self.recipe.batch.slot
        keep = keep_of_batch(self.seed, step, batch, slot, self._drop_path_rates, images)
        keys = randomness.key(self.seed, step, batch.ids.numpy(), Purpose.SAMPLE_OBJECTS)
        keys = torch.from_numpy(keys.view("int64")).to(images.device, non_blocking=True)
        sums, counts = model(images, batch.view_sizes, batch.objects, keys, keep)
        losses = {name: _within_slots(sums[name], counts[name], slot).mean() for name in sums}
        self.parts = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack([*losses.values()]).sum()

    def smooth_loss(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the sum of the root mean squares of the heads' outputs about anchors and fixed boxes.

        Rounding moves it little. The loss itself may jump, because rounding may change which proposals are kept.
        """
        images, slot = self._normalised(model, batch), self.recipe.batch.slot
        keep = keep_of_batch(self.seed, step, batch, slot, self._drop_path_rates, images)
        outputs = model.outputs_on_fixed_boxes(images, keep)
        return torch.stack([x.square().mean().sqrt() for x in outputs]).sum()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the detections of the batch, which a `tally` collects."""
        detections = model(self._normalised(model, batch), batch.view_sizes)
        return {name: value for name, value in vars(detections).items() if value is not None}

    def tally(self) -> "DetectionTally":
        return DetectionTally(self.settings.has_masks)

    def paint(self, model: nn.Module, batch: Batch) -> ObjectOverlays:
        detected = detected_objects(Detections(**self.evaluate(model, batch)), batch.view_sizes, batch.image_sizes)
        shown = batch.valid.nonzero().flatten().tolist()
        sizes = batch.view_sizes.tolist()
        images = [batch.images[n, :, : sizes[n][0], : sizes[n][1]].cpu().numpy() for n in shown]
        truths = [true_objects(batch.annotated, int(batch.ids[n]), detected[n].size) for n in shown]
        return ObjectOverlays(images, truths, [detected[n] for n in shown])

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> AdaptedWeights:
        return AdaptedWeights(*detector_weights(weights, self._meta_tensors(), self.recipe.init.head == "keep"))


def _within_slots(sums: Tensor, counts: Tensor, slot: int) -> Tensor:
    """Divide the sums of each slot's images (N,) by what was counted in the slot: (slots,)."""
    return sums.view(-1, slot).sum(1) / counts.view(-1, slot).sum(1).clamp(min=1)


class DetectionTally:
    """Collects what was detected in the images of this rank, and compares all ranks' with what is annotated."""

    def __init__(self, masks: bool):
        self._masks = masks
        self._packed: list[Packed] = []
        self._annotated: Objects | None = None

    def add(self, scores: Mapping[str, Tensor], batch: Batch) -> None:
        self._annotated = batch.annotated
        detected = detected_objects(Detections(**scores), batch.view_sizes, batch.image_sizes)
        valid = batch.valid.tolist()
        samples = [sample for sample, counts in zip(batch.ids.tolist(), valid, strict=True) if counts]
        own = [objects for objects, counts in zip(detected, valid, strict=True) if counts]
        self._packed.append(pack_objects(samples, own))

    def metrics(self, world: World, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Return COCO's figures. Each rank compares its share of the classes, outside of any collective's time limit.

        Raises:
            DataError: if no annotated object counts, so that there is no average precision.
        """
        joined = tuple(map(torch.cat, zip(*self._packed, strict=True)))
        samples, detected = unpack_objects(tuple(world.concatenate(part) for part in joined), self._masks)
        classes = len(self._annotated.category_ids)
        own = range(world.rank, classes, world.size)

        def compare() -> Tensor:
            return torch.from_numpy(compare_classes(self._annotated, samples, detected, own, self._masks))

        compared = world.on_every_rank(compare, should_stop)
        if compared is None:
            return None
        tables = compared.new_zeros(*compared.shape[:3], classes, *compared.shape[4:])
        tables[:, :, :, world.rank :: world.size] = compared
        figures = summarise(world.sum(tables).numpy(), self._masks).figures
        if not figures:
            raise DataError(
                f"the {len(samples)} undamaged images of data.validation have no single object, so there is no average"
                " precision; copy or prepare the file again, or name another"
            )
        return figures


def true_objects(objects: Objects, sample: int, size: tuple[int, int]) -> ImageObjects:
    """Return the annotated objects of a sample, whose image has this height and width in pixels."""
    rows = objects.rows(sample)
    boxes = rows["box"].copy()
    boxes[:, 2:] += boxes[:, :2]
    masks = [objects.mask(row) for row in rows] if objects.has_masks else None
    return ImageObjects(size, boxes, rows["class"].astype("int64"), None, masks, rows["crowd"] == 1)


def detector_options(recipe: StageRecipe) -> DetectorOptions:
    """The options of `create_detector` that a recipe asks for."""
    settings = recipe.objective
    renamed = {"channels": settings.head_channels, "masks": settings.has_masks, "map_norms": settings.map_norms}
    if settings.map_norms is None:
        renamed["map_norms"] = recipe.model.family != "nextvit"
    # The other fields have equal names.
    names = DetectorOptions.__dataclass_fields__.keys() & type(settings).model_fields.keys() - renamed.keys()
    return DetectorOptions(**{name: getattr(settings, name) for name in names}, **renamed)


def detection_facts(recipe: StageRecipe) -> dict[str, Any]:
    """The entry `detection` in the facts of a weights file: what builds the model again, and how it is tested."""
    return {"head": asdict(detector_options(recipe)), "test_size": list(recipe.data.views.test_size)}
