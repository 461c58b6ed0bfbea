"""Channels of one block as pictures, the way to see a collapse with the eye (arXiv 2301.00808, figure 3).

Each small square is one MLP channel of one image, the input of the block's last linear layer, over its sites. A dead
channel is black, a saturated one is bright everywhere; `feature_diversity` has the numbers for all blocks.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import UserError
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.feature_diversity import dead_and_saturated
from tools.analyze.images import Images
from tools.analyze.layer_adapters import Layer, by_channel, layers_of, watching
from tools.analyze.paper_figure import WIDTH_INCHES, add_caption, paper_figure

CHANNELS = 64  # that are shown, evenly spaced among all
_BRIGHTEST = 0.995  # white is this quantile of a square's values, because single bright sites would darken all others


def layer_at(model: AnalyzedModel, depth: float) -> Layer:
    """The block nearest to a depth from 0 (the first) to 1 (the last) of those that have MLP channels.

    Raises:
        UserError: if the model has no such block.
    """
    layers = [layer for layer in layers_of(model.network) if layer.reader is not None]
    if not layers:
        raise UserError(f"{model.label} has no block with MLP channels; choose a model of another family")
    return min(layers, key=lambda layer: abs(layer.depth - depth))


@torch.no_grad()
def mlp_channels(model: AnalyzedModel, layer: Layer, pixels: Tensor) -> Tensor:
    """The MLP channels of a block for uint8 images (n, 3, S, S), as float (n, C, sites)."""
    assert layer.reader is not None
    seen: list[Tensor] = []

    def look(reader: nn.Module, x: Tensor) -> None:
        seen.append(by_channel(model.network, reader, x))

    with watching({layer.reader: layer.reader}, look, inputs=True):
        for part in pixels.split(16):
            model.network(model.prepare(part))
    return torch.cat(seen).float().cpu()


def channel_maps(
    models: Sequence[AnalyzedModel], images: Images, depth: float
) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
    """The numbers of the figure, and each model's maps (images, channels, h, w)."""
    measured, maps, metrics = [], [], {}
    for model in models:
        layer = layer_at(model, depth)
        features = mlp_channels(model, layer, images.pixels)
        dead, saturated = (share.mean().item() for share in dead_and_saturated(features))
        chosen = np.linspace(0, features.shape[1] - 1, min(CHANNELS, features.shape[1])).round().astype(int)
        side = math.isqrt(features.shape[2])
        maps.append(features[:, chosen].unflatten(2, (side, side)).numpy())
        measured.append(
            {**model.facts(), "layer": layer.name, "channels": chosen.tolist(), "dead": dead, "saturated": saturated}
        )
        metrics |= {f"{model.label}/dead": dead, f"{model.label}/saturated": saturated}
    return {"images": images.facts(), "depth": depth, "models": measured, "metrics": metrics}, maps


def montage(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """The channels (C, h, w) of one image as one picture from 0 to 1, in rows; NaN between neighbours."""
    channels, height, width = maps.shape
    columns = math.isqrt(channels - 1) + 1
    rows = -(-channels // columns)
    brightest = max(float(np.quantile(maps, _BRIGHTEST)), np.finfo(np.float32).tiny)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan, np.float32)
    for place, channel in enumerate(maps):
        y, x = place // columns * (height + 1), place % columns * (width + 1)
        picture[y : y + height, x : x + width] = np.clip(channel / brightest, 0, 1)
    return picture


def draw_channel_maps(numbers: dict[str, Any], images: Images, maps: Sequence[NDArray[np.float32]]) -> Figure:
    """A row for each image: the image, then the channels of each model."""
    models, count = numbers["models"], len(images.pixels)
    side = WIDTH_INCHES / (len(models) + 1)
    colours = matplotlib.colormaps["inferno"].with_extremes(bad="#808080")
    with paper_figure(side * count + 1.0) as figure:
        axes = figure.subplots(count, len(models) + 1, squeeze=False)
        for axis in axes.ravel():
            axis.set_axis_off()
        for row, (pixels, line) in enumerate(zip(images.pixels, axes, strict=True)):
            line[0].imshow(pixels.permute(1, 2, 0).numpy())
            for axis, of_model in zip(line[1:], maps, strict=True):
                axis.imshow(montage(of_model[row]), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        for axis, model in zip(axes[0, 1:], models, strict=True):
            flat = f"{model['dead']:.1%} dead, {model['saturated']:.1%} saturated"
            axis.set_title(f"{model['label']}\n{model['layer']}\n{flat}", fontsize=7)
        seen = numbers["images"]
        shown = f"{len(models[0]['channels'])} MLP channels of a block, {count} images at {seen['image_size']} px"
        add_caption(figure, f"{shown}; the shares are those of all channels", models)
        return figure
