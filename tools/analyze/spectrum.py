"""Fourier spectrum of features: whether a network keeps edges and texture (high frequencies) or only shapes (low).

The spectrum of a stage is log(|FFT| + 1e-6) of its map, averaged over images and channels. The curve is the diagonal of
the spectrum from frequency 0 to the highest, minus the value at 0 ("relative log amplitude", Park and Kim, arXiv
2202.06709). Next-ViT shows such pictures without naming the tensor; here they are of the last map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import UserError
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.images import Images
from tools.analyze.layer_adapters import adapter_of, stage_ends, watching
from tools.analyze.paper_figure import add_caption, add_legend, line_styles, paper_figure

FLOOR = 1e-6


def log_amplitudes(features: Tensor) -> Tensor:
    """log(|FFT| + 1e-6) of maps (N, C, n, n), in float64; element [.., i, j] has frequency 2 pi (i, j) / n."""
    return (torch.fft.fft2(features.double()).abs() + FLOOR).log()


def relative_diagonal(amplitudes: Tensor) -> Tensor:
    """The diagonal of amplitudes (n, n) at frequencies 0, 2 pi / n, ... up to pi, minus the value at 0."""
    diagonal = amplitudes.diagonal()[: len(amplitudes) // 2 + 1]
    return diagonal - diagonal[0]


@torch.no_grad()
def stage_spectra(model: AnalyzedModel, images: Images, batch: int = 16) -> dict[str, Any]:
    """Mean log amplitudes of the map after each stage.

    Raises:
        UserError: if the last map is too small to have frequencies.
    """
    adapter, ends = adapter_of(model.network), stage_ends(model.network)
    sums: dict[int, Tensor] = {}

    def look(stage: int, x: Tensor) -> None:
        amplitudes = log_amplitudes(adapter.to_map(model.network, x)).mean(1).sum(0).cpu()
        sums[stage] = sums.get(stage, 0) + amplitudes

    with watching({end.stage: end.block for end in ends}, look):
        for pixels in images.pixels.split(batch):
            model.network(model.prepare(pixels))
    means = {stage: total / len(images.pixels) for stage, total in sums.items()}
    if len(means[ends[-1].stage]) < 3:
        raise UserError(f"{model.label}: the last map has fewer than 3 sites on a side; give a larger --image-size")
    return {
        **model.facts(),
        "stages": [
            {
                "stage": stage + 1,
                "log_amplitudes": [[round(value, 4) for value in row] for row in mean.tolist()],
                "frequencies_over_pi": [2 * i / len(mean) for i in range(len(mean) // 2 + 1)],
                "relative_log_amplitude": [round(value, 4) for value in relative_diagonal(mean).tolist()],
            }
            for stage, mean in sorted(means.items())
            if len(mean) >= 3
        ],
    }


def spectrum(models: Sequence[AnalyzedModel], images: Images) -> dict[str, Any]:
    """The numbers of the figure."""
    measured, metrics = [stage_spectra(model, images) for model in models], {}
    for model in measured:
        for stage in model["stages"][:-1]:
            del stage["log_amplitudes"]  # large maps would be megabytes of text
        metrics[f"{model['label']}/highest_frequency"] = model["stages"][-1]["relative_log_amplitude"][-1]
    return {"images": images.facts(), "models": measured, "metrics": metrics}


def draw_spectrum(numbers: dict[str, Any]) -> Figure:
    """The spectra of the last maps as pictures on one scale, and the curves from frequency 0 to the highest."""
    models = numbers["models"]
    pictures = []
    for model in models:
        amplitudes = torch.tensor(model["stages"][-1]["log_amplitudes"])
        pictures.append(torch.fft.fftshift(amplitudes - amplitudes[0, 0]))
    low, high = min(p.min().item() for p in pictures), max(p.max().item() for p in pictures)
    with paper_figure(0.8 + 4.0 / len(models) + 2.6) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[0.3 + 4.0 / len(models), 2.6])
        axes = above.subplots(1, len(models), squeeze=False)[0]
        for axis, model, picture in zip(axes, models, pictures, strict=True):
            side = picture.shape[0]
            edge = [-(side // 2) - 0.5, side - side // 2 - 0.5]
            box = [2 * value / side for value in (*edge, *edge)]
            drawn = axis.imshow(
                picture.numpy(), cmap="cividis", vmin=low, vmax=high, extent=box, interpolation="nearest"
            )
            axis.set(title=model["label"], xticks=[-1, 0, 1], yticks=[-1, 0, 1] if axis is axes[0] else [])
            axis.grid(False)
        axes[0].set_ylabel("frequency (π)")
        above.supxlabel("frequency (π)", fontsize=9)
        above.colorbar(drawn, ax=list(axes), shrink=0.8).set_label("relative log\namplitude")
        axis = below.subplots()
        for style, model in zip(line_styles(), models, strict=False):
            last = model["stages"][-1]
            axis.plot(last["frequencies_over_pi"], last["relative_log_amplitude"], **style, label=model["label"])
        axis.set(xlabel="frequency along the diagonal (π)", ylabel="relative log amplitude")
        add_legend(below, axis)
        images = numbers["images"]
        text = f"map after the last stage; {images['count']} images at {images['image_size']} px"
        add_caption(below, text, models)
        return figure
