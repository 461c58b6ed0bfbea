"""What is evaluated: a weights file of any layout, a stage's directory, or a run's; as a model, with what is known."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.models import VARIANTS, ConvNeXtV2
from pipeline.stage.directory import Stage
from tools.weights.model import build, open_weights

SQUASHED_FROM = 384  # pixels: the official evaluation squashes images of this size and above to a square


@dataclass(frozen=True)
class EvaluatedModel:
    """`model` gives logits, or the last map (n, C, h, w) where `classes` is 0."""

    source: str
    model: nn.Module
    name: str | None
    """The published variant that it has the shape of."""
    classes: int
    class_names: tuple[str, ...] | None
    weights: str
    """Which of a file's weights these are, as far as it says."""
    image_size: int
    crop_pct: float


def default_crop(image_size: int) -> float:
    """The share of the resized image's side that is cut out: 1 squashes the whole image."""
    return 1.0 if image_size >= SQUASHED_FROM else 0.875


def load_evaluated_model(
    path: str, *, ema: bool | None = None, image_size: int | None = None, crop_pct: float | None = None
) -> EvaluatedModel:
    """Load weights on the CPU.

    Args:
        path, ema: see `open_weights`, also for errors.
        image_size, crop_pct: instead of the stage's, the file's, or 224 and what goes with the size.
    """
    opened = open_weights(path, ema=ema)
    facts = opened.facts
    size = image_size or facts.get("image_size") or _size_in_name(path) or 224
    if crop_pct is None and opened.stage is not None:
        data = Stage(opened.stage).recipe.data
        crop_pct = data.crop_pct if size == data.image_size else None
    model = build(opened.tensors, facts.get("model"), opened.source)
    names = tuple(facts.get("classes") or ()) or None
    crop = crop_pct or default_crop(size)
    return EvaluatedModel(path, model, _variant(model), model.num_classes, names, opened.which, size, crop)


def _variant(model: nn.Module) -> str | None:
    if not (isinstance(model, ConvNeXtV2) and model.response.kind == "grn"):
        return None
    return next((name for name, shape in VARIANTS.items() if shape == (model.depths, model.dims)), None)


def _size_in_name(path: str) -> int | None:
    """The official files name their resolution: convnextv2_huge_22k_512_ema.pt."""
    found = re.search(r"(?<!\d)(224|288|384|512)(?!\d)", Path(path).name)
    return int(found[1]) if found else None
