"""Feature diversity, layer by layer: how much the channels of a network differ (arXiv 2301.00808, section 4).

The channels of an image are vectors over its sites; their diversity is the mean over all pairs of (1 - cos) / 2. It is
0 if all channels are the same picture, and 0.5 if they are unrelated. The paper's sum includes the pair of each channel
with itself, and so is smaller by a factor of 1 - 1 / channels. Channels that are zero everywhere have no direction and
count as dead instead.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.images import Images
from tools.analyze.layer_adapters import Layer, adapter_of, by_channel, layers_of, watching
from tools.analyze.paper_figure import add_caption, add_legend, line_styles, paper_figure

DEAD = 0.01  # a channel is dead if no site exceeds this share of the layer's root mean square in that image
SATURATED = 0.1  # a live channel is saturated if its deviation over the sites is below this share of its mean


def diversity(features: Tensor) -> Tensor:
    """Mean of (1 - cos) / 2 over pairs of channels, (N, C, sites) to (N,); NaN with fewer than two live channels."""
    wide = features.double()
    norms = wide.norm(dim=2, keepdim=True)
    directions = wide / norms.where(norms > 0, 1)
    alive = (norms > 0).sum((1, 2))
    # The sum of all cosines is the squared sum of the directions; that of a channel with itself is 1.
    cosines = directions.sum(1).square().sum(1) - alive
    pairs = alive * (alive - 1)
    return ((1 - cosines / pairs) / 2).where(pairs > 0, torch.nan)


def dead_and_saturated(features: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of dead and of saturated channels in each image, (N, C, sites) to (N,) and (N,)."""
    wide = features.double()
    level = wide.square().mean((1, 2)).sqrt()[:, None]
    dead = wide.abs().amax(2) <= DEAD * level
    saturated = ~dead & (wide.std(2, correction=0) < SATURATED * wide.mean(2).abs())
    return dead.double().mean(1), saturated.double().mean(1)


@torch.no_grad()
def layer_diversity(model: AnalyzedModel, images: Images, batch: int = 16) -> dict[str, Any]:
    """Diversity of each block's output and of its MLP channels, and the shares of MLP channels that are dead or
    saturated: means over the images.
    """
    layers, adapter = layers_of(model.network), adapter_of(model.network)
    seen: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def output(layer: Layer, x: Tensor) -> None:
        seen[layer.name]["diversity"].append(diversity(adapter.to_map(model.network, x).flatten(2)))

    def hidden(layer: Layer, x: Tensor) -> None:
        assert layer.reader is not None
        channels, into = by_channel(model.network, layer.reader, x), seen[layer.name]
        into["mlp_diversity"].append(diversity(channels))
        dead, saturated = dead_and_saturated(channels)
        into["dead"].append(dead)
        into["saturated"].append(saturated)

    blocks = {layer: layer.block for layer in layers}
    readers = {layer: layer.reader for layer in layers if layer.reader is not None}
    with watching(blocks, output), watching(readers, hidden, inputs=True):
        for pixels in images.pixels.split(batch):
            model.network(model.prepare(pixels))
    return {
        **model.facts(),
        "layers": [
            {"name": layer.name, "depth": layer.depth}
            | {name: torch.cat(values).nanmean().item() for name, values in seen[layer.name].items()}
            for layer in layers
        ],
    }


def feature_diversity(models: Sequence[AnalyzedModel], images: Images) -> dict[str, Any]:
    """The numbers of the figure."""
    measured = [layer_diversity(model, images) for model in models]
    metrics = {
        f"{model['label']}/{name}": fmean(values)
        for model in measured
        for name in ("diversity", "mlp_diversity", "dead", "saturated")
        if (values := [layer[name] for layer in model["layers"] if name in layer])
    }
    return {"images": images.facts(), "models": measured, "metrics": metrics}


def draw_feature_diversity(numbers: dict[str, Any]) -> Figure:
    """Three panels over normalised depth: diversity of blocks, of their MLP channels; dead and saturated channels."""
    with paper_figure(6.2) as figure:
        blocks, mlps, flat = figure.subplots(3, 1, sharex=True)
        for style, model in zip(line_styles(), numbers["models"], strict=False):
            layers = model["layers"]
            depth = [layer["depth"] for layer in layers]
            blocks.plot(depth, [layer["diversity"] for layer in layers], **style, label=model["label"])
            known = [layer for layer in layers if "dead" in layer]
            depth = [layer["depth"] for layer in known]
            mlps.plot(depth, [layer["mlp_diversity"] for layer in known], **style)
            flat.plot(depth, [100 * (layer["dead"] + layer["saturated"]) for layer in known], **style)
            flat.plot(depth, [100 * layer["dead"] for layer in known], color=style["color"], alpha=0.45, linewidth=0.9)
        blocks.set(title="Features after each block", ylabel="diversity (0 to 1)")
        mlps.set(title="MLP channels of each block", ylabel="diversity (0 to 1)")
        flat.set(title="Flat MLP channels: dead or saturated (thin line: dead)", ylabel="share of channels (%)")
        flat.set(xlabel="normalised depth (0: first block, 1: last)", xlim=(-0.02, 1.02))
        flat.set_ylim(0, max(1.0, flat.get_ylim()[1]))
        for axis in (blocks, mlps):
            axis.axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
        add_legend(figure, blocks)
        seen = numbers["images"]
        count = f"{seen['count']} images of {seen['classes']} classes at {seen['image_size']} px"
        add_caption(figure, f"{count}; dotted: unrelated channels", numbers["models"])
        return figure
