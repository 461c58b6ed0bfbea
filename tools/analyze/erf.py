"""Effective receptive field: which pixels the middle of the last map depends on, by the protocol of RepLKNet and SLaK.

For each image, one by one: the gradient of the summed positive activations at the site (h // 2, w // 2) of the last map
with respect to the pixels, its positive part summed over colours; the mean over images, then log10(d + 1) over its
maximum. Published: 50 images at 1024 px, each squashed into the square.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError
from tools.analyze.families import family_of, stage_ends, watching
from tools.analyze.figure import WIDTH_INCHES, caption, legend, line_styles, new_figure, paper_style, said_of
from tools.analyze.images import Images
from tools.analyze.models import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
BRIGHTEST = 0.995  # quantile at which the colours end: single pixels would leave the others in the dark
_SHOWN_PIXELS = 256  # of a heat map in the figure


def receptive_field(subject: Subject, images: Tensor) -> NDArray[np.float64]:
    """uint8 images (n, 3, S, S) to the mean of their positive gradients, (S, S).

    Raises:
        UserError: if no image gives finite gradients that are not all zero.
    """
    model, family, last = subject.model, family_of(subject.model), stage_ends(subject.model)[-1]
    maps: list[Tensor] = []
    total, counted = torch.zeros(images.shape[2:], dtype=torch.float64), 0
    model.requires_grad_(False)
    for image in images.split(1):
        pixels = subject.prepare(image).requires_grad_()
        maps.clear()
        with watching({0: last.block}, lambda _, x: maps.append(family.to_map(model, x))):
            model(pixels)
        middle = maps[0][:, :, maps[0].shape[2] // 2, maps[0].shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.relu().sum(), pixels)
        field = gradient.relu().sum((0, 1)).double().cpu()
        if field.isfinite().all():
            total, counted = total + field, counted + 1
    if not counted or not total.any():
        raise UserError(f"{subject.label}: the middle of the last map depends on no pixel of any image; try others")
    return (total / counted).numpy()


def on_log_scale(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """The protocol's scale, 0 to 1."""
    scaled = np.log10(field + 1)
    return scaled / scaled.max()


def centred_shares(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of the field's sum within the centred squares of sides 1, 3, 5, ..."""
    height, width = field.shape
    y, x = np.ogrid[:height, :width]
    ring = np.maximum(abs(y - height // 2), abs(x - width // 2))
    sums = np.bincount(ring.ravel(), weights=field.ravel()).cumsum()
    return sums / sums[-1]


def area_ratios(field: NDArray[np.float64], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict[str, float]]:
    """For each threshold the smallest centred square with more than that share: its side in pixels, and its area as a
    share of the image's. A high ratio at a given threshold is a wide receptive field."""
    shares, size = centred_shares(field), field.shape[0]
    sides = {t: min(2 * int(np.argmax(shares > t)) + 1, size) for t in thresholds}
    return {str(t): {"side": side, "area_ratio": (side / size) ** 2} for t, side in sides.items()}


def analyse(subjects: Sequence[Subject], images: Images) -> tuple[dict[str, Any], list[NDArray[np.float64]]]:
    """The numbers of the figure, and each model's field on the protocol's scale."""
    models, fields = [], []
    for subject in subjects:
        field = receptive_field(subject, images.pixels)
        fields.append(on_log_scale(field))
        models.append(
            {
                **subject.described(),
                "thresholds": area_ratios(fields[-1]),
                # The logarithm depends on the gradients' magnitude, so without it too.
                "thresholds_without_log": area_ratios(field),
                "centred_shares": [round(share, 5) for share in centred_shares(fields[-1]).tolist()],
            }
        )
    metrics = {
        f"{model['label']}/area_ratio_{t}": found["area_ratio"]
        for model in models
        for t, found in model["thresholds"].items()
    }
    return {"images": images.described(), "models": models, "metrics": metrics}, fields


def draw(numbers: dict[str, Any], fields: Sequence[NDArray[np.float64]]) -> "Figure":
    """The models' fields as heat maps, and below them how the shares grow with the centred square."""
    models, size = numbers["models"], numbers["images"]["image_size"]
    columns = min(len(models), 4)
    rows = math.ceil(len(models) / columns)
    side = WIDTH_INCHES / columns
    with paper_style():
        figure = new_figure((side + 0.1) * rows + 0.65 + 2.9)
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
        legend(below, axis)
        images = f"{numbers['images']['count']} images at {size} px"
        caption(below, f"{images}; dotted: the thresholds {', '.join(map(str, THRESHOLDS))}", said_of(models))
        return figure


def _pooled(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over squares of pixels, so that the picture has about as many as are printed."""
    step = max(field.shape[0] // _SHOWN_PIXELS, 1)
    side = field.shape[0] // step * step
    return field[:side, :side].reshape(side // step, step, side // step, step).mean((1, 3))
