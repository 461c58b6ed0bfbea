"""Write ONNX files, say in them what their images must be, and compare outputs."""

import copy
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.recipe.channel_statistics import ChannelStatistics

ONNX_TOLERANCE = 1e-4  # relative to the largest output; another order of sums in fp32 differs by about 1e-6
ONE_FILE_BYTES = 1_800_000_000  # an ONNX file is a protobuf message, which is limited to 2 GiB


def folded(model: nn.Module) -> nn.Module:
    """A copy with BatchNorms and small kernels folded into convolutions; the model itself if it has none."""
    return copy.deepcopy(model).fold_batchnorm() if hasattr(model, "fold_batchnorm") else model


def write_onnx(model: nn.Module, path: Path, size: tuple[int, int], *, external: bool) -> None:
    """Write a folded model as ONNX with input `images` (N, C, height, width).

    external: write the weights to a second file.
    """
    images = torch.zeros(2, getattr(model, "in_channels", 3), *size)  # the latency bench also exports timm's models
    names = (["images"], ["logits" if model.num_classes else "features"])
    write_graph(model, (images,), path, names, ({0: torch.export.Dim("batch")},), external=external)


def write_graph(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    names: tuple[list[str], list[str]],
    dynamic_shapes: tuple[Any, ...],
    *,
    external: bool,
) -> None:
    """Write a model as ONNX.

    Args:
        names: of the inputs and of the outputs.
        dynamic_shapes: see `torch.onnx.export`.
        external: write the weights to a second file.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            model, inputs, path, input_names=names[0], output_names=names[1], external_data=external,
            dynamic_shapes=dynamic_shapes, verbose=False, dynamo=True,
        )  # fmt: skip


def describe_input(
    path: Path, channels: int, size: tuple[int, int], about: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Write into an ONNX file's metadata what its images must be, each value as JSON.

    The keys are in_channels, image_size (height and width), mean and std (of pixels from 0 to 1), classes if the names
    of the outputs are known, and those of `more`.
    """
    import onnx

    statistics = ChannelStatistics.of_weights(about, channels)
    facts: dict[str, Any] = {"in_channels": channels, "image_size": list(size)}
    facts |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    if about.get("classes"):
        facts["classes"] = about["classes"]
    facts |= more or {}
    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    onnx.save(model, path)


def relative_difference(expected: torch.Tensor, outputs: torch.Tensor) -> float:
    """The largest difference relative to the largest expected output; 0 or infinity if that is 0."""
    if expected.shape != outputs.shape:
        return math.inf
    difference, largest = (expected - outputs).abs().max().item(), expected.abs().max().item()
    return difference / largest if largest else math.inf if difference else 0.0
