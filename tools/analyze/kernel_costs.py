"""Parameters and multiply-adds as functions of the kernel size: those of square kernels grow with its square, those of
SLaK's decomposed kernels linearly (arXiv 2207.03620).

The formulas are for the ConvNeXt V1 skeleton, which SLaK and its RepLKNet form share; tests compare them with real
models. Multiply-adds are those of convolutions and linear layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.figure import Figure

from pipeline.errors import UserError
from tools.analyze.paper_figure import add_caption, add_legend, line_styles, paper_figure

Form = Literal["square", "decomposed"]
SHORT_EDGE = 5  # SLaK's N
LAST_STAGE = 13  # the largest kernel of the last stage, whose map is 7 x 7 at 224 px
SIZES = (7, 13, 21, 31, 41, 51, 61)
DEPTHS, DIMS = (3, 3, 9, 3), (96, 192, 384, 768)


@dataclass(frozen=True)
class ModelCost:
    """Numbers of parameters, and of multiply-adds for one image."""

    parameters: int
    macs: int


def stage_kernels(size: int) -> tuple[int, int, int, int]:
    """The kernel sizes of the four stages, as published for 31, 51 and 61: such as 51, 49, 47, 13."""
    return (size, size, size, size) if size <= LAST_STAGE else (size, size - 2, size - 4, LAST_STAGE)


def branch_kernels(form: Form, size: int) -> list[tuple[int, int]]:
    """The convolutions of a channel: K x K if square, K x N and N x K if decomposed; and N x N beside them if N < K."""
    large = [(size, size)] if form == "square" else [(size, SHORT_EDGE), (SHORT_EDGE, size)]
    return [*large, *([(SHORT_EDGE, SHORT_EDGE)] if size > SHORT_EDGE else [])]


def model_cost(form: Form, size: int, dims: Sequence[int] = DIMS, image_size: int = 224) -> ModelCost:
    """Cost of the skeleton with kernels of `stage_kernels(size)` and 1000 classes, BatchNorm counted as a layer."""
    side = image_size // 4
    parameters = (3 * 16 + 1 + 2) * dims[0]  # stem: convolution, bias, LayerNorm
    macs = 3 * 16 * dims[0] * side**2
    for stage, (depth, dim, kernel) in enumerate(zip(DEPTHS, dims, stage_kernels(size), strict=True)):
        sites = (side >> stage) ** 2
        if stage:  # downsampling: LayerNorm, convolution, bias
            parameters += 2 * dims[stage - 1] + (4 * dims[stage - 1] + 1) * dim
            macs += 4 * dims[stage - 1] * dim * sites
        kernels = branch_kernels(form, kernel)
        weights = (sum(height * width for height, width in kernels) + 8 * dim) * dim  # depthwise, MLP
        # BatchNorms, LayerNorm, biases of both linear layers, layer scale
        parameters += depth * (weights + (2 * len(kernels) + 2 + 5 + 1) * dim)
        macs += depth * weights * sites
    parameters += 2 * dims[-1] + (dims[-1] + 1) * 1000
    return ModelCost(parameters, macs + dims[-1] * 1000)


def kernel_costs(sizes: Sequence[int] = SIZES, width: float = 1.0, image_size: int = 224) -> dict[str, Any]:
    """The numbers of the figure, for the tiny model with all widths times `width`.

    Raises:
        UserError: for kernels that are not odd.
    """
    if wrong := [size for size in sizes if size < 3 or size % 2 == 0]:
        raise UserError(f"kernel size {wrong[0]} must be odd and at least 3")
    dims = [int(dim * width) for dim in DIMS]
    forms: tuple[Form, Form] = ("square", "decomposed")
    rows = []
    for size in sorted(sizes):
        costs = {form: vars(model_cost(form, size, dims=dims, image_size=image_size)) for form in forms}
        rows.append({"kernel": size, "stages": stage_kernels(size), **costs})
    return {"depths": DEPTHS, "dims": dims, "short_edge": SHORT_EDGE, "image_size": image_size, "sizes": rows}


def draw_kernel_costs(numbers: dict[str, Any]) -> Figure:
    """Multiply-adds and parameters, each over the kernel size."""
    labels = {
        "square": f"square K x K + {SHORT_EDGE} x {SHORT_EDGE} (RepLKNet)",
        "decomposed": f"K x {SHORT_EDGE} + {SHORT_EDGE} x K + {SHORT_EDGE} x {SHORT_EDGE} (SLaK)",
    }
    rows = numbers["sizes"]
    sizes = [row["kernel"] for row in rows]
    with paper_figure(2.9) as figure:
        left, right = figure.subplots(1, 2)
        for style, (form, label) in zip(line_styles(), labels.items(), strict=False):
            left.plot(sizes, [row[form]["macs"] / 1e9 for row in rows], **style, label=label)
            right.plot(sizes, [row[form]["parameters"] / 1e6 for row in rows], **style)
        left.set(ylabel=f"multiply-adds at {numbers['image_size']} px (10⁹)")
        right.set(ylabel="parameters (10⁶)")
        for axis in (left, right):
            axis.set(xlabel="kernel size K (sites)", xticks=sizes)
            axis.set_ylim(bottom=0)
        add_legend(figure, left, columns=2)
        kernels = f"stages: K, K-2, K-4, {LAST_STAGE}; up to {LAST_STAGE}, K in all"
        add_caption(figure, f"ConvNeXt-T skeleton of widths {', '.join(map(str, numbers['dims']))}, dense; {kernels}")
        return figure
