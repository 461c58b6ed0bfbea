"""Open the models of an analysis by words such as `runs/demo label="FCMAE"` or `timm:resnet50 pretrained=true`.

The first word is a weights file of any layout that `fcmae convert` reads, a run or stage directory, `timm:NAME`, or the
name of one of our models, which gets random weights. The other words are options: `label=...` is the name in the
figure, `entry=...` the entry of a checkpoint file to read, `weights=FILE` loads weights into one of timm's models,
`gain=1` draws random weights that keep the variance, and all others are arguments of the model.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UserError, first_line
from pipeline.models import create_model
from pipeline.objectives.pixels import grey_levels, levels
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.storage.bounded_files import parse_yaml
from pipeline.weights.foreign import load_tensors
from pipeline.weights.input_channels import refuse_other_channels
from tools.analyze.timm_import import import_timm
from tools.weights.model import build_model, open_weights

RANDOM = "random weights"


@dataclass(frozen=True)
class AnalyzedModel:
    """A model in evaluation mode, and the normalisation of its input."""

    label: str
    network: nn.Module
    weights: str
    """The origin of the weights."""
    mean: tuple[float, ...] = levels(IMAGENET)[0]
    std: tuple[float, ...] = levels(IMAGENET)[1]
    """Of pixel levels from 0 to 255, like `mean`."""
    classes: tuple[str, ...] = ()
    """The names of the outputs, where they are known."""

    def prepare(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (N, 3, H, W) for the model, on its device."""
        parameter = next(self.network.parameters())
        images = grey_levels(images) if len(self.mean) == 1 else images
        mean, std = (torch.tensor(values).to(parameter).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.to(parameter) - mean) / std

    def facts(self) -> dict[str, Any]:
        """The entry of the model in the JSON beside a figure."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {"label": self.label, "weights": self.weights, "parameters": parameters}


def open_model(words: str, image_size: int, device: torch.device | str = "cpu") -> AnalyzedModel:
    """Open the model that the words name.

    image_size: pixels on a side; some of timm's models are built for one size.

    Raises:
        UserError: if there is no such model or file, or an option does not fit.
    """
    try:
        name, *rest = [words] if Path(words).exists() else shlex.split(words) or [""]
        options = {key: parse_yaml(value) for key, value in (word.split("=", 1) for word in rest)}
    except (ValueError, OSError):  # OSError: the words are too long for a path
        raise UserError(
            f"model {words!r} is no file, and its words after the first are not all KEY=VALUE; correct them"
        ) from None
    label = options.pop("label", None)
    if name.startswith("timm:"):
        opened = _open_timm(name.removeprefix("timm:"), options, image_size)
    elif name and (Path(name).is_dir() or Path(name).suffix or "/" in name):
        opened = _open_weights(name, options)
    else:
        opened = _with_random_weights(name, options)
    opened.network.to(device).eval()
    return opened if label is None else replace(opened, label=str(label))


def _with_random_weights(name: str, options: dict[str, Any]) -> AnalyzedModel:
    gain = options.pop("gain", None)
    try:
        model = create_model(name, **options)
        if gain is None:
            return AnalyzedModel(name, model, RANDOM)
        keep_variance(model, float(gain))
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name}: {error}") from error
    return AnalyzedModel(name, model, f"{RANDOM} (gain {gain})")


@torch.no_grad()
def keep_variance(model: nn.Module, gain: float) -> None:
    """Draw weights of standard deviation gain / sqrt(inputs of the layer), and set layer scales to 1.

    Initial weights for training are far smaller: their blocks add almost nothing, and the receptive field would be that
    of the patches.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, gain / math.sqrt(module.weight[0].numel()), generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma") and parameter.ndim == 1:
            parameter.fill_(1)


def _open_weights(path: str, options: dict[str, Any]) -> AnalyzedModel:
    entry = options.pop("entry", None)
    if options:
        raise UserError(f"model {path}: {next(iter(options))} does not go with weights; the file fixes the model")
    opened = open_weights(path, entry=entry)
    model = build_model(opened.tensors, opened.facts.get("model"), opened.source)
    stage = opened.stage and opened.stage.resolve()
    label = f"{stage.parent.name}/{stage.name}" if stage else Path(path).stem
    refuse_other_channels(model.in_channels, opened.source)
    scale = levels(ChannelStatistics.of_weights(opened.facts, model.in_channels))
    return AnalyzedModel(label, model, opened.source, *scale, tuple(opened.facts.get("classes") or ()))


def _open_timm(name: str, options: dict[str, Any], image_size: int) -> AnalyzedModel:
    timm, path = import_timm(), options.pop("weights", None)
    try:
        config = timm.get_pretrained_cfg(name)
        if config and config.fixed_input_size:
            options.setdefault("img_size", image_size)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = timm.create_model(name, **options)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"timm cannot make the model {name}: {reason}; see `timm.list_models()`") from error
    if path is not None:  # timm's own checkpoint_path unpickles anything in older versions
        _load_into(model, path, load_tensors(path)[0])
    source = path or ("timm's weights" if options.get("pretrained") else RANDOM)
    mean, std = (tuple(255 * value for value in model.pretrained_cfg[key]) for key in ("mean", "std"))
    return AnalyzedModel(name, model, str(source), mean, std)


def _load_into(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Load every floating tensor of the model; the file may hold more, and BatchNorm's counters stay 0."""
    floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    if missing := [name for name in floating if name not in tensors]:
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}; name the weights' own model")
    try:
        model.load_state_dict({name: tensors[name].float() for name in floating}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: {reason.removesuffix('.')}; name the weights' own model") from error
