"""Grad-CAM heat maps (Selvaraju et al., arXiv 1610.02391): the places in an image that speak for a class.

Each channel of the last map is weighted by the mean over sites of the gradient of the class's logit; the heat map is
the positive part of the weighted sum.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import UserError
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.images import Images
from tools.analyze.layer_adapters import adapter_of, run_to_last_map
from tools.analyze.paper_figure import WIDTH_INCHES, add_caption, paper_figure

ClassChoice = Literal["predicted", "label"]


def heat_map(features: Tensor, gradients: Tensor) -> Tensor:
    """Heat (N, h, w) from the last map (N, C, h, w) and the gradients of a logit with respect to it."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).relu()


def class_heat_maps(
    model: AnalyzedModel, images: Images, of: ClassChoice = "predicted"
) -> tuple[dict[str, Any], Tensor]:
    """The model's class and probability for each image, and heat maps (n, size, size) from 0 to 1.

    Raises:
        UserError: if the model gives no logits, or they do not depend on the last map.
    """
    adapter = adapter_of(model.network)
    model.network.requires_grad_(False)
    heats, answers = [], []
    for pixels, label in zip(images.pixels.split(1), images.labels.tolist(), strict=True):
        with torch.enable_grad():
            logits, features = run_to_last_map(model.network, model.prepare(pixels).requires_grad_())
        if logits.ndim != 2:
            raise UserError(f"{model.label} has no head, so it has no classes; give a classifier")
        target = label if of == "label" else int(logits.argmax())
        if target >= logits.shape[1]:
            raise UserError(f"{model.label} has {logits.shape[1]} classes, but an image has label {target}")
        (gradients,) = torch.autograd.grad(logits[0, target], features, allow_unused=True)
        if gradients is None or not adapter.to_map(model.network, gradients).any():
            raise UserError(
                f"{model.label}: the class does not depend on the map after the last stage, as in a transformer with"
                " a class token; give a model that averages its last map"
            )
        heat = heat_map(*(adapter.to_map(model.network, x) for x in (features.detach(), gradients)))
        heat = F.interpolate(heat[None], images.pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        heats.append(heat.cpu() / heat.max().clamp_min(torch.finfo(heat.dtype).tiny).cpu())
        name = model.classes[target] if target < len(model.classes) else str(target)
        answers.append({"class": name, "probability": round(logits.softmax(1)[0, target].item(), 4)})
    return {**model.facts(), "images": answers}, torch.stack(heats)


def heat_maps(models: Sequence[AnalyzedModel], images: Images, of: ClassChoice) -> tuple[dict[str, Any], list[Tensor]]:
    """The numbers of the figure, and each model's heat maps."""
    measured, heats = zip(*(class_heat_maps(model, images, of) for model in models), strict=True)
    labels = [images.classes[label] for label in images.labels.tolist()]
    return {"images": images.facts(), "labels": labels, "class_looked_for": of, "models": list(measured)}, list(heats)


def draw_heat_maps(numbers: dict[str, Any], images: Images, heats: Sequence[Tensor]) -> Figure:
    """A row for each image, a column for each model: the photograph in grey under the heat."""
    models, count, heat_colours = numbers["models"], len(images.pixels), "inferno"
    cell = min((WIDTH_INCHES - 0.7) / (len(models) + 1), 1.5)
    with paper_figure((cell + 0.2) * count + 0.7, (cell + 0.03) * (len(models) + 1) + 0.7) as figure:
        grid = figure.subplots(count, len(models) + 1, squeeze=False)
        for row, axes in enumerate(grid):
            photograph = images.pixels[row].permute(1, 2, 0).numpy()
            axes[0].imshow(photograph)
            if len(images.classes) > 1:
                axes[0].set_xlabel(_shortened(numbers["labels"][row]), fontsize=7, labelpad=2)
            for axis, model, heat in zip(axes[1:], models, heats, strict=True):
                axis.imshow(photograph @ [0.299, 0.587, 0.114], cmap="gray", vmin=0, vmax=255)
                # Without heat, the photograph keeps its brightness.
                shown = heat[row].numpy()
                axis.imshow(shown, cmap=heat_colours, vmin=0, vmax=1, alpha=0.8 * shown**0.5)
                answer = model["images"][row]
                axis.set_xlabel(f"{_shortened(answer['class'])}, {answer['probability']:.1%}", fontsize=7, labelpad=2)
            for axis in axes:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for axis, title in zip(grid[0], ["image", *(model["label"] for model in models)], strict=True):
            axis.set_title(title)
        bar = figure.colorbar(ScalarMappable(cmap=heat_colours), ax=list(grid.ravel()), aspect=30, pad=0.02)
        bar.set_label("heat (share of its maximum)")
        which = {"predicted": "the predicted one", "label": "the image's label"}[numbers["class_looked_for"]]
        add_caption(figure, f"below each: the class ({which}) and its probability", models)
        return figure


def _shortened(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"
