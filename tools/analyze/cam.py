"""Grad-CAM heat maps (Selvaraju et al., arXiv 1610.02391): which places speak for a class, on the map after a stage.

Each channel is weighted by the mean over sites of the gradient of the class's logit; the positive part of the weighted
sum is the heat map.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from tools.analyze.families import family_of, stage_ends, watching
from tools.analyze.figure import WIDTH_INCHES, caption, new_figure, paper_style, said_of
from tools.analyze.images import Images
from tools.analyze.models import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(features: Tensor, gradients: Tensor) -> Tensor:
    """The map (N, C, h, w) of a stage, and the gradients of a logit with respect to it, to (N, h, w)."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).relu()


def measure(
    subject: Subject, images: Images, of: Literal["predicted", "label"] = "predicted"
) -> tuple[dict[str, Any], Tensor]:
    """What the model says about each image, and heat maps (n, size, size) from 0 to 1.

    Raises:
        UserError: if the model gives no logits, or they do not depend on the map.
    """
    model, family, last = subject.model, family_of(subject.model), stage_ends(subject.model)[-1]
    model.requires_grad_(False)
    heats, chosen, sure = [], [], []
    features: list[Tensor] = []

    def branch_off(_: Any, x: Tensor) -> None:
        features.append(x)

    for pixels, labels in zip(images.pixels.split(1), images.labels, strict=True):
        features.clear()
        with watching({0: last.block}, branch_off), torch.enable_grad():
            logits = model(subject.prepare(pixels).requires_grad_())
        if logits.ndim != 2:
            raise UserError(f"{subject.label} has no head, so there is no class to look for; take a classifier")
        target = int(labels) if of == "label" else int(logits.argmax())
        if target >= logits.shape[1]:
            raise UserError(f"{subject.label} has {logits.shape[1]} classes, but an image has label {target}")
        (gradients,) = torch.autograd.grad(logits[0, target], features[0], allow_unused=True)
        if gradients is None or not family.to_map(model, gradients).any():
            raise UserError(
                f"{subject.label}: the class does not depend on the map after the last stage, as in a transformer with"
                " a class token; take a model that averages its last map"
            )
        heat = heat_map(*(family.to_map(model, x) for x in (features[0].detach(), gradients)))
        heat = F.interpolate(heat[None], images.pixels.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        heats.append(heat.cpu() / heat.max().clamp_min(torch.finfo(heat.dtype).tiny).cpu())
        chosen.append(target)
        sure.append(logits.softmax(1)[0, target].item())
    names = [subject.classes[c] if c < len(subject.classes) else str(c) for c in chosen]
    found = [{"class": name, "probability": round(p, 4)} for name, p in zip(names, sure, strict=True)]
    return {**subject.described(), "images": found}, torch.stack(heats)


def analyse(
    subjects: Sequence[Subject], images: Images, of: Literal["predicted", "label"] = "predicted"
) -> tuple[dict[str, Any], list[Tensor]]:
    """The numbers of the figure, and each model's heat maps."""
    measured = [measure(subject, images, of) for subject in subjects]
    return {
        "images": images.described(),
        "labels": [images.classes[label] for label in images.labels.tolist()],
        "class_looked_for": of,
        "models": [numbers for numbers, _ in measured],
    }, [heats for _, heats in measured]


def draw(numbers: dict[str, Any], images: Images, heats: Sequence[Tensor]) -> "Figure":
    """A row for each image, a column for each model: the photograph in grey under the heat."""
    from matplotlib.cm import ScalarMappable

    models, count, heat_colours = numbers["models"], len(images.pixels), "inferno"
    cell = min((WIDTH_INCHES - 0.7) / (len(models) + 1), 1.5)
    with paper_style():
        figure = new_figure((cell + 0.2) * count + 0.7, (cell + 0.03) * (len(models) + 1) + 0.7)
        grid = figure.subplots(count, len(models) + 1, squeeze=False)
        for row, axes in enumerate(grid):
            photograph = images.pixels[row].permute(1, 2, 0).numpy()
            axes[0].imshow(photograph)
            if len(images.classes) > 1:
                axes[0].set_xlabel(_short(numbers["labels"][row]), fontsize=7, labelpad=2)
            for axis, model, heat in zip(axes[1:], models, heats, strict=True):
                axis.imshow(photograph @ [0.299, 0.587, 0.114], cmap="gray", vmin=0, vmax=255)
                # Where there is no heat, the photograph stays as bright as it is.
                shown = heat[row].numpy()
                axis.imshow(shown, cmap=heat_colours, vmin=0, vmax=1, alpha=0.8 * shown**0.5)
                said = model["images"][row]
                axis.set_xlabel(f"{_short(said['class'])}, {said['probability']:.1%}", fontsize=7, labelpad=2)
            for axis in axes:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for axis, title in zip(grid[0], ["image", *(model["label"] for model in models)], strict=True):
            axis.set_title(title)
        bar = figure.colorbar(ScalarMappable(cmap=heat_colours), ax=list(grid.ravel()), aspect=30, pad=0.02)
        bar.set_label("heat (share of its maximum)")
        which = {"predicted": "the predicted one", "label": "the image's label"}[numbers["class_looked_for"]]
        caption(figure, f"below each: the class looked for ({which}) and its probability", said_of(models))
        return figure


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"
