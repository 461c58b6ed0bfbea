"""Response normalisation of a block, GRN or another; the fused form of GRN's formula stands in kernels/grn.py.

It stands between GELU and the second linear layer of a ConvNeXt block, on 4C channels. ConvNeXt V2 has GRN there; the
other kinds are the ones that its paper compares GRN with (arXiv 2301.00808, table 2). Each is a module called with
features (N, sites..., 4C) and their layout. A statistic over sites comes from the layout, so that hidden sites count
nowhere. Statistics are at least fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.gelu_grn import gelu_grn
from pipeline.kernels.grn import grn
from pipeline.kernels.precision import widen
from pipeline.kernels.triton_support import runs_triton, takes_plain_kernels
from pipeline.models.backbone import check_choices
from pipeline.models.batchnorm import RunningStatistics
from pipeline.sparse import Layout

EPS = 1e-6

KINDS = ("grn", "none", "lrn", "bn", "ln", "se", "cbam")
AGGREGATIONS = ("l2", "l1", "average")
NORMALISERS = ("mean", "sum", "inverse", "standardise")


@dataclass(frozen=True)
class ResponseNorm:
    """Which response normalisation the blocks of a model have.

    Args:
        kind: one of KINDS; "none" is ConvNeXt V1.
        aggregation: GRN only, how a channel's sites become one number: L2 norm, L1 norm or average.
        normaliser: GRN only, how that number is compared with the other channels of the image: "mean" divides by their
            mean (equation 2 with its footnote, and the official code), "sum" by their sum (equation 2 as printed),
            "inverse" is the inverse of their mean, "standardise" subtracts their mean and divides by their deviation.
        residual: GRN only, whether the input is added.
    """

    kind: str = "grn"
    aggregation: str = "l2"
    normaliser: str = "mean"
    residual: bool = True

    def __post_init__(self):
        check_choices(
            response=(self.kind, KINDS),
            grn_aggregation=(self.aggregation, AGGREGATIONS),
            grn_normaliser=(self.normaliser, NORMALISERS),
        )
        if self.kind != "grn" and (self.aggregation, self.normaliser, self.residual) != ("l2", "mean", True):
            raise ValueError(
                f"response is {self.kind!r}, which has no grn_aggregation, grn_normaliser, grn_residual; leave them out"
            )

    @property
    def name(self) -> str:
        """The name of the module in a block: the official one for GRN."""
        return "grn" if self.kind == "grn" else "response"

    def create(self, dim: int) -> nn.Module:
        """Create the module for `dim` channels."""
        if self.kind == "grn":
            return GRN(dim, self.aggregation, self.normaliser, self.residual)
        kinds = {"none": NoNorm, "lrn": LRN, "bn": ResponseBatchNorm, "ln": ResponseLayerNorm, "se": SE, "cbam": CBAM}
        return kinds[self.kind](dim)


class GRN(nn.Module):
    """Global response normalisation: scale each channel by its share of the image's response (paper, algorithm 1).

        share = norm / (mean of norm over the channels + 1e-6), norm = L2 norm of a channel over its sites
        y = gamma * (x * share) + beta + x

    `gamma` and `beta` are (1, 1, 1, C). With the residual both start at 0, so GRN starts as the identity; without it
    gamma starts at 1. For `aggregation`, `normaliser` and `residual` see `ResponseNorm`. Statistics are those of each
    image; set `across_images` to mix all images of the batch, as the official PyTorch pre-training code does.
    """

    def __init__(self, dim: int, aggregation: str = "l2", normaliser: str = "mean", residual: bool = True):
        super().__init__()
        self.aggregation, self.normaliser, self.residual = aggregation, normaliser, residual
        self.initial_constants = {"gamma": 0.0 if residual else 1.0}
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.across_images = False

    def after_linear(self, linear: nn.Linear, x: Tensor, layout: Layout) -> Tensor:
        """Normalise GELU of a linear layer. On a GPU one operator computes GELU, this layer, and the gradient of the
        linear layer's bias.

        Not where a weight is empty: ZeRO-3 gathers it when its own layer is called.
        """
        whole = all(weight.numel() for weight in (linear.weight, linear.bias, self.gamma, self.beta))
        if not (whole and self._has_kernels(x, layout) and runs_triton(x.device)):
            return self(F.gelu(linear(x)), layout)
        y = F.linear(x, linear.weight, linear.bias.detach())
        return gelu_grn(y, linear.bias, self.gamma.flatten(), self.beta.flatten(), self.across_images, EPS)

    def _has_kernels(self, x: Tensor, layout: Layout) -> bool:
        published = (self.aggregation, self.normaliser, self.residual) == ("l2", "mean", True)
        return published and layout.count_sites(x) * x.shape[0] * x.shape[-1] == x.numel()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Normalise features."""
        by_formula = torch.compiler.is_compiling() or takes_plain_kernels()
        if self._has_kernels(x, layout) and not by_formula:
            return grn(x, self.gamma.flatten(), self.beta.flatten(), self.across_images, EPS)
        scale = self.gamma.flatten() * self._share(self._aggregate(x, layout))
        if self.residual:
            scale = 1 + scale
        # Round the product, not the scale: as a bf16 number a scale of 1.010 is 1.008 for every site of the channel.
        return torch.addcmul(self.beta.flatten(), x, scale).to(x.dtype)

    def _aggregate(self, x: Tensor, layout: Layout) -> Tensor:
        if self.aggregation == "l2":
            return layout.norm(x, self.across_images)
        if self.aggregation == "average":
            return layout.mean(x, self.across_images)
        sites = layout.count_sites(x) * (x.shape[0] if self.across_images else 1)
        return layout.mean(x.abs(), self.across_images) * sites

    def _share(self, response: Tensor) -> Tensor:
        if self.normaliser == "sum":
            return response / (response.sum(-1, keepdim=True) + EPS)
        mean = response.mean(-1, keepdim=True)
        if self.normaliser == "mean":
            return response / (mean + EPS)
        if self.normaliser == "inverse":
            return 1 / (mean + EPS)
        return (response - mean) * (response.var(-1, correction=0, keepdim=True) + EPS).rsqrt()


class NoNorm(nn.Module):
    """The identity: ConvNeXt V1."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x


class LRN(nn.Module):
    """Local response normalisation over 5 neighbouring channels, with the constants of Krizhevsky et al. 2012, 3.3."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        squares = widen(x).square().flatten(0, -2)
        sums = F.avg_pool1d(squares[None], 5, stride=1, padding=2)[0] * 5
        return (x * (2.0 + 1e-4 * sums).pow(-0.75).view(x.shape)).to(x.dtype)


class ResponseLayerNorm(nn.Module):
    """LayerNorm over the channels of each site."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class ResponseBatchNorm(RunningStatistics, nn.Module):
    """BatchNorm over the sites of the batch that count."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        wide = widen(x)
        if self.training:
            mean = layout.mean(wide, across_images=True)
            variance = layout.mean((wide - mean).square(), across_images=True)
            count = layout.count_sites(x) * x.shape[0]
            self.seen = (mean.detach().flatten(), variance.detach().flatten() * (count / max(count - 1, 1)))
        else:
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * (variance + EPS).rsqrt()
        return ((wide - mean) * scale + self.bias).to(x.dtype)


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): scale each channel by a gate computed from the means of all channels."""

    def __init__(self, dim: int):
        super().__init__()
        width = max(dim // 16, 1)
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x * self.gate(layout.mean(x).to(x.dtype)).sigmoid().to(x.dtype)

    def gate(self, pooled: Tensor) -> Tensor:
        """Compute the logits of the gate from pooled channels (N, 1..., C)."""
        return self.fc2(F.relu(self.fc1(pooled)))


class CBAM(SE):
    """Convolutional block attention (Woo et al. 2018): a gate on channels, then a gate on sites.

    The first is computed from the channels' means and maxima, the second by a 7x7 convolution over each site's mean and
    maximum.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        pooled = self.gate(layout.mean(x).to(x.dtype)) + self.gate(layout.maximum(x))
        x = x * pooled.sigmoid().to(x.dtype)
        mean_and_maximum = torch.stack((x.mean(-1), x.amax(-1)), -1)
        return x * layout.convolve(self.conv, mean_and_maximum).sigmoid().to(x.dtype)
