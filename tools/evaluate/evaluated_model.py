"""Load a model to evaluate: from a weights file of any layout, a stage or a run."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.models import VARIANTS, ConvNeXtV2
from pipeline.stage.directory import Stage
from tools.weights.model import build_model, open_weights

SQUASHED_FROM = 384  # pixels; the official evaluation squashes whole images to a square from this size on


@dataclass(frozen=True)
class EvaluatedModel:
    """A model on the CPU, and how its images are resized and cropped.

    `model` returns logits, or the last map (N, C, h, w) if `classes` is 0.
    """

    model: nn.Module
    name: str | None
    """The published variant with this shape, such as convnextv2_tiny."""
    classes: int
    class_names: tuple[str, ...] | None
    weights: str
    """Which weights of the file these are, such as "model_ema"."""
    image_size: int
    crop_pct: float


def default_crop(image_size: int) -> float:
    """The centre crop's side as a fraction of the resized image; 1 squashes the whole image to a square."""
    return 1.0 if image_size >= SQUASHED_FROM else 0.875


def load_evaluated_model(
    path: str, *, ema: bool | None = None, image_size: int | None = None, crop_pct: float | None = None
) -> EvaluatedModel:
    """Load weights as a model on the CPU.

    Args:
        path: see `open_weights`; also for `ema` and for errors.
        image_size: pixels. Default: that of the stage or the file, or 224.
        crop_pct: default: that of the stage if the size is the stage's, else see `default_crop`.
    """
    opened = open_weights(path, ema=ema)
    facts = opened.facts
    size = image_size or facts.get("image_size") or _size_in_name(path) or 224
    if crop_pct is None and opened.stage is not None:
        data = Stage(opened.stage).recipe.data
        crop_pct = data.crop_pct if size == data.image_size else None
    model = build_model(opened.tensors, facts.get("model"), opened.source)
    names = tuple(facts.get("classes") or ()) or None
    crop = crop_pct or default_crop(size)
    return EvaluatedModel(model, _variant(model), model.num_classes, names, opened.which, size, crop)


def _variant(model: nn.Module) -> str | None:
    if not (isinstance(model, ConvNeXtV2) and model.response.kind == "grn"):
        return None
    return next((name for name, shape in VARIANTS.items() if shape == (model.depths, model.dims)), None)


def _size_in_name(path: str) -> int | None:
    """The official files have their resolution in the name: convnextv2_huge_22k_512_ema.pt."""
    size = re.search(r"(?<!\d)(224|288|384|512)(?!\d)", Path(path).name)
    return int(size[1]) if size else None
