"""The weights that a run on one's own images starts from: their file, and the model that they need."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.staging import is_url
from pipeline.errors import CheckpointError
from tools.weights.convert import architecture_of
from tools.weights.model import open_weights

SCRATCH = "scratch"  # as a --from: no weights
RELEASED = "https://dl.fbaipublicfiles.com/convnext/convnextv2/"
RECOMMENDED = "convnextv2_tiny_1k_224_fcmae.pt"


@dataclass(frozen=True)
class StartingWeights:
    """A file of weights and its model.

    Attributes:
        model: fields of the recipe's model section.
        image_size: of the images that it was trained on, in pixels, or [height, width]; None if the file does not say.
    """

    path: str
    model: dict[str, Any]
    image_size: int | list[int] | None


def starting_weights(place: str) -> StartingWeights:
    """Find the weights of a finished run or stage, or of a file of any layout, and the model that they need.

    Raises:
        UserError: if there are none, they are not finished, or they are of another family than ConvNeXt.
    """
    if not is_url(place) and not os.path.exists(place):
        raise CheckpointError(f"--from {place} does not exist; {_where_to_get(place)}")
    opened = open_weights(place)
    if is_url(opened.source) and not is_url(place):
        raise CheckpointError(f"--from {place} is not finished; resume it first, or name a file that it exported")
    model = {name: value for name, value in (opened.facts.get("model") or {}).items() if value is not None}
    if not model:
        architecture = architecture_of(opened.tensors)
        options = {name: value for name, value in architecture.model_options.items() if name != "num_classes"}
        if options.get("in_channels") == 3:
            del options["in_channels"]
        if architecture.variant and architecture.variant.startswith("convnextv2_"):
            options = {name: value for name, value in options.items() if name not in ("depths", "dims")}
            model = {"name": architecture.variant, **options}
        else:
            model = {"name": architecture.family, **options}
    if not str(model["name"]).startswith("convnextv2"):
        raise CheckpointError(
            f"--from {place} is of a {model['name']}, and this command trains ConvNeXt V2; use `fcmae run` with"
            " a recipe of that family"
        )
    path = opened.source if is_url(opened.source) else str(Path(opened.source).absolute())
    return StartingWeights(path, model, opened.facts.get("image_size"))


def _where_to_get(place: str) -> str:
    name = Path(place).name
    if match := re.fullmatch(r"convnextv2_\w+_(1k|22k)_\d+_(fcmae|ema)\.pt", name):
        folder = "pt_only" if match[2] == "fcmae" else f"im{match[1]}"
        return f"download {RELEASED}{folder}/{name}"
    return f"name a run, a stage, a file of weights, or {SCRATCH}"
