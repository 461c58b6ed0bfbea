"""Effective receptive field: the pixels that the middle of the last map depends on, by RepLKNet's and SLaK's protocol.

For each image: take the gradient of the summed positive activations at site (h // 2, w // 2) of the last map with
respect to the pixels, and sum its positive part over the colours. The field is the mean over the images, d; shown is
log10(d + 1) divided by its maximum. Published: 50 images at 1024 px, each squashed into the square.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.images import Images
from tools.analyze.layer_adapters import adapter_of, run_to_last_map
from tools.analyze.paper_figure import WIDTH_INCHES, add_caption, add_legend, line_styles, paper_figure

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
BRIGHTEST = 0.995  # the colours end at this quantile, because single bright pixels would leave the others dark
_SHOWN_PIXELS = 256  # of a heat map in the figure


def receptive_field(model: AnalyzedModel, images: Tensor) -> NDArray[np.float64]:
    """The mean of the positive gradients of uint8 images (n, 3, S, S), as (S, S).

    Raises:
        UserError: if no image gives finite gradients that are not all zero.
    """
    adapter = adapter_of(model.network)
    total, counted = torch.zeros(images.shape[2:], dtype=torch.float64), 0
    model.network.requires_grad_(False)
    for image in images.split(1):
        pixels = model.prepare(image).requires_grad_()
        last_map = adapter.to_map(model.network, run_to_last_map(model.network, pixels)[1])
        middle = last_map[:, :, last_map.shape[2] // 2, last_map.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.relu().sum(), pixels)
        field = gradient.relu().sum((0, 1)).double().cpu()
        if field.isfinite().all():
            total, counted = total + field, counted + 1
    if not counted or not total.any():
        raise UserError(f"{model.label}: the middle of the last map depends on no pixel of any image; try others")
    return (total / counted).numpy()


def on_log_scale(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """The field on the protocol's logarithmic scale, 0 to 1."""
    scaled = np.log10(field + 1)
    return scaled / scaled.max()


def centred_shares(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shares of the field's sum within the centred squares of sides 1, 3, 5, ..."""
    height, width = field.shape
    y, x = np.ogrid[:height, :width]
    ring = np.maximum(abs(y - height // 2), abs(x - width // 2))
    sums = np.bincount(ring.ravel(), weights=field.ravel()).cumsum()
    return sums / sums[-1]


def area_ratios(field: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """For each of THRESHOLDS, the smallest centred square that holds more than that share of the field's sum.

    Returns its side in pixels, and its area as a share of the image's: the larger the area, the wider the field.
    """
    shares, size = centred_shares(field), field.shape[0]
    sides = {t: min(2 * int(np.argmax(shares > t)) + 1, size) for t in THRESHOLDS}
    return {str(t): {"side": side, "area_ratio": (side / size) ** 2} for t, side in sides.items()}


def receptive_fields(
    models: Sequence[AnalyzedModel], images: Images
) -> tuple[dict[str, Any], list[NDArray[np.float64]]]:
    """The numbers of the figure, and each model's field on the protocol's scale."""
    measured, metrics, fields = [], {}, []
    for model in models:
        field = receptive_field(model, images.pixels)
        fields.append(on_log_scale(field))
        squares = area_ratios(fields[-1])
        measured.append(
            {
                **model.facts(),
                "thresholds": squares,
                "thresholds_without_log": area_ratios(field),  # the logarithm depends on the gradients' magnitude
                "centred_shares": [round(share, 5) for share in centred_shares(fields[-1]).tolist()],
            }
        )
        metrics |= {f"{model.label}/area_ratio_{t}": square["area_ratio"] for t, square in squares.items()}
    return {"images": images.facts(), "models": measured, "metrics": metrics}, fields


def draw_receptive_fields(numbers: dict[str, Any], fields: Sequence[NDArray[np.float64]]) -> Figure:
    """The models' fields as heat maps, and below them the shares of centred squares over their areas."""
    models, size = numbers["models"], numbers["images"]["image_size"]
    columns = min(len(models), 4)
    rows = math.ceil(len(models) / columns)
    side = WIDTH_INCHES / columns
    with paper_figure((side + 0.1) * rows + 0.65 + 2.9) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[(side + 0.1) * rows + 0.65, 2.9])
        axes = above.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, model, field in zip(axes, models, fields, strict=False):
            axis.set_title(model["label"])
            shown = _pooled(field)
            picture = axis.imshow(shown / np.quantile(shown, BRIGHTEST), cmap="magma", vmin=0, vmax=1)
        bar = above.colorbar(picture, ax=list(axes), location="bottom", fraction=0.06, pad=0.02, aspect=40)
        bar.set_label(f"contribution of a pixel (share of its {BRIGHTEST} quantile)")
        axis = below.subplots()
        for style, model in zip(line_styles(), models, strict=False):
            shares = np.array(model["centred_shares"])
            sides = np.minimum(2 * np.arange(len(shares)) + 1, size)
            style["markevery"] = max(len(shares) // 8, 1)
            axis.plot(100 * (sides / size) ** 2, 100 * shares, **style, label=model["label"])
        for threshold in THRESHOLDS:
            axis.axhline(100 * threshold, color="#888888", linewidth=0.7, linestyle=":")
        axis.set(xlabel="area of the centred square (% of the image)", ylabel="share of the sum (%)")
        axis.set(xlim=(-1, 101), ylim=(0, 103))
        add_legend(below, axis)
        text = f"{numbers['images']['count']} images at {size} px; dotted: the thresholds "
        add_caption(below, text + ", ".join(map(str, THRESHOLDS)), models)
        return figure


def _pooled(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over squares of pixels, so that the picture has about as many pixels as the print."""
    step = max(field.shape[0] // _SHOWN_PIXELS, 1)
    side = field.shape[0] // step * step
    return field[:side, :side].reshape(side // step, step, side // step, step).mean((1, 3))
