"""The models that an analysis is asked for, by words: `runs/demo label="FCMAE"`, `timm:resnet50 pretrained=true`.

The first word is a weights file of any layout that `fcmae convert` reads, a run or stage directory, `timm:NAME`, or one
of our models by name, with random weights. Words after it are options: `label=...` is the name in the figure,
`entry=...` the key of a checkpoint to read, `weights=FILE` fills one of timm's models, `gain=1` draws random weights
that keep the variance, and all others are arguments of the model.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UserError, first_line
from pipeline.models import create_model
from pipeline.objectives.pixels import MEAN, STD
from pipeline.weights.foreign import load_tensors
from tools.analyze.timm_import import import_timm
from tools.weights.model import build, open_weights

RANDOM = "random weights"


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode. `weights` says where they come from; `mean` and `std` are of levels in 0..255;
    `classes` are the names of its outputs where they are known."""

    label: str
    model: nn.Module
    weights: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    classes: tuple[str, ...] = ()

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to the input of the model, on its device."""
        parameter = next(self.model.parameters())
        mean, std = (torch.tensor(values).to(parameter).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images.to(parameter) - mean) / std

    def described(self) -> dict[str, Any]:
        """For the numbers beside a figure."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"label": self.label, "weights": self.weights, "parameters": parameters}


def open_model(words: str, image_size: int, device: torch.device | str = "cpu") -> Subject:
    """The model that the words name; some of timm's are built for one image size.

    Raises:
        UserError: if there is no such model or file, or an option does not fit.
    """
    try:
        name, *rest = shlex.split(words) or [""]
        options = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in rest)}
    except (ValueError, yaml.YAMLError):
        raise UserError(f"model {words!r} has no form NAME KEY=VALUE ...; quote it as one argument") from None
    label = options.pop("label", None)
    if name.startswith("timm:"):
        subject = _timm(name.removeprefix("timm:"), options, image_size)
    elif name and (Path(name).is_dir() or Path(name).suffix or "/" in name):
        subject = _weights(name, options)
    else:
        subject = _random(name, options)
    subject.model.to(device).eval()
    return subject if label is None else replace(subject, label=str(label))


def _random(name: str, options: dict[str, Any]) -> Subject:
    gain = options.pop("gain", None)
    try:
        model = create_model(name, **options)
        if gain is None:
            return Subject(name, model, RANDOM)
        keep_variance(model, float(gain))
    except (TypeError, ValueError) as error:
        raise UserError(f"model {name}: {error}") from error
    return Subject(name, model, f"{RANDOM} (gain {gain})")


@torch.no_grad()
def keep_variance(model: nn.Module, gain: float, seed: int = 0) -> None:
    """Random weights of deviation gain / sqrt(inputs of the layer), and layer scales of 1.

    Initial values for training are far smaller: their blocks add next to nothing, and every receptive field would be
    that of the patches.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, gain / math.sqrt(module.weight[0].numel()), generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma") and parameter.ndim == 1:
            parameter.fill_(1)


def _weights(path: str, options: dict[str, Any]) -> Subject:
    entry = options.pop("entry", None)
    if options:
        raise UserError(f"model {path}: {next(iter(options))} does not go with weights, which say what they are")
    opened = open_weights(path, entry=entry)
    model = build(opened.tensors, opened.facts.get("model"), opened.source)
    stage = opened.stage and opened.stage.resolve()
    label = f"{stage.parent.name}/{stage.name}" if stage else Path(path).stem
    return Subject(label, model, opened.source, classes=tuple(opened.facts.get("classes") or ()))


def _timm(name: str, options: dict[str, Any], image_size: int) -> Subject:
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
        raise UserError(f"timm cannot make the model {name}: {reason}; `timm.list_models()` lists them") from error
    if path is not None:  # not by timm's checkpoint_path, which in older versions unpickles anything
        _fill(model, path, load_tensors(path)[0])
    source = path or ("timm's weights" if options.get("pretrained") else RANDOM)
    mean, std = (tuple(255 * value for value in model.pretrained_cfg[key]) for key in ("mean", "std"))
    return Subject(name, model, str(source), mean, std)


def _fill(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Every floating tensor of the model from those of the file, of which it may need fewer. Counters stay 0."""
    floating = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    if missing := [name for name in floating if name not in tensors]:
        raise CheckpointError(f"{path} lacks {missing[0]} of the model; name the model that the weights are of")
    try:
        model.load_state_dict({name: tensors[name].float() for name in floating}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: {reason.removesuffix('.')}; name the model that the weights are of") from error
