"""Feature diversity, layer by layer: whether the channels of a network say different things (arXiv 2301.00808, 3.1).

Of an image's channels as vectors over its sites: the mean over all pairs of (1 - cos) / 2. It is 0 if all channels are
the same picture, 0.5 if they have nothing to do with each other. The paper's sum also has each channel's pair with
itself, which makes it smaller by a factor of 1 - 1 / channels. Channels that are zero throughout have no direction and
are left out; they are counted as dead instead.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tools.analyze.families import Layer, by_channel, family_of, layers_of, watching
from tools.analyze.figure import caption, legend, line_styles, new_figure, paper_style, said_of
from tools.analyze.images import Images
from tools.analyze.models import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEAD = 0.01  # of the root mean square of the layer in that image: no site of the channel is above it
SATURATED = 0.1  # of its mean: the channel is not dead, and its deviation over the sites is below it


def diversity(features: Tensor) -> Tensor:
    """(N, C, sites) to the mean over pairs of different channels of (1 - cos) / 2, (N,); NaN with fewer than two."""
    wide = features.double()
    norms = wide.norm(dim=2, keepdim=True)
    directions = wide / norms.where(norms > 0, 1)
    alive = (norms > 0).sum((1, 2))
    # The sum of all cosines is the square of the sum of the directions; each channel's with itself is 1.
    cosines = directions.sum(1).square().sum(1) - alive
    pairs = alive * (alive - 1)
    return ((1 - cosines / pairs) / 2).where(pairs > 0, torch.nan)


def dead_and_saturated(features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, sites) to the shares of channels that are dead and saturated in each image, (N,) and (N,)."""
    wide = features.double()
    level = wide.square().mean((1, 2)).sqrt()[:, None]
    dead = wide.abs().amax(2) <= DEAD * level
    saturated = ~dead & (wide.std(2, correction=0) < SATURATED * wide.mean(2).abs())
    return dead.double().mean(1), saturated.double().mean(1)


@torch.no_grad()
def measure(subject: Subject, images: Images, batch: int = 16) -> dict[str, Any]:
    """Diversity of what each block gives and of its MLP channels, and which of these are dead or saturated: means over
    the images.
    """
    layers = layers_of(subject.model)
    family = family_of(subject.model)
    seen: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def output(layer: Layer, x: Tensor) -> None:
        seen[layer.name]["diversity"].append(diversity(family.to_map(subject.model, x).flatten(2)))

    def hidden(layer: Layer, x: Tensor) -> None:
        assert layer.reader is not None
        channels, into = by_channel(layer.reader, x), seen[layer.name]
        into["mlp_diversity"].append(diversity(channels))
        dead, saturated = dead_and_saturated(channels)
        into["dead"].append(dead)
        into["saturated"].append(saturated)

    blocks = {layer: layer.block for layer in layers}
    readers = {layer: layer.reader for layer in layers if layer.reader is not None}
    with watching(blocks, output), watching(readers, hidden, inputs=True):
        for pixels in images.pixels.split(batch):
            subject.model(subject.prepare(pixels))
    return {
        **subject.described(),
        "layers": [
            {"name": layer.name, "depth": layer.depth}
            | {name: torch.cat(values).nanmean().item() for name, values in seen[layer.name].items()}
            for layer in layers
        ],
    }


def analyse(subjects: Sequence[Subject], images: Images) -> dict[str, Any]:
    """The numbers of the figure."""
    models = [measure(subject, images) for subject in subjects]
    metrics = {
        f"{model['label']}/{name}": sum(found) / len(found)
        for model in models
        for name in ("diversity", "mlp_diversity", "dead", "saturated")
        if (found := [layer[name] for layer in model["layers"] if name in layer])
    }
    return {"images": images.described(), "models": models, "metrics": metrics}


def draw(numbers: dict[str, Any]) -> "Figure":
    """Three panels over normalised depth: diversity of blocks, of their MLP channels; dead and saturated channels."""
    with paper_style():
        figure = new_figure(6.2)
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
        legend(figure, blocks)
        seen = numbers["images"]
        count = f"{seen['count']} images of {seen['classes']} classes at {seen['image_size']} px"
        caption(
            figure, f"{count}; dotted: channels that have nothing to do with each other", said_of(numbers["models"])
        )
        return figure
