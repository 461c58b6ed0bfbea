"""The response-normalisation slot of a block, between GELU and the second linear layer, on 4C channels.

GRN is what ConvNeXt V2 puts there; the others are what its paper compares GRN with (arXiv 2301.00808, table 2). Each
kind is a module called with features and their layout, and a statistic that crosses sites asks the layout for it, so
that hidden sites count nowhere. Statistics are at least fp32, whatever the features are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.grn import grn
from pipeline.sparse import Layout

EPS = 1e-6

KINDS = ("grn", "none", "lrn", "bn", "ln", "se", "cbam")
AGGREGATIONS = ("l2", "l1", "average")
NORMALISERS = ("mean", "sum", "inverse", "standardise")


@dataclass(frozen=True)
class Response:
    """What is in the slot. The last three fields are GRN's own and must be left alone for any other kind.

    `aggregation` makes one number of a channel's sites: L2 norm, L1 norm or average. `normaliser` compares the channels
    of an image by it: over the mean of all (equation 2 with its footnote, and the official code), over the sum
    (equation 2 as printed), the inverse of the mean alone, or standardised. `residual` adds the input.
    """

    kind: str = "grn"
    aggregation: str = "l2"
    normaliser: str = "mean"
    residual: bool = True

    def __post_init__(self):
        for field, choices in (("kind", KINDS), ("aggregation", AGGREGATIONS), ("normaliser", NORMALISERS)):
            value = getattr(self, field)
            if value not in choices:
                name = "response" if field == "kind" else f"grn_{field}"
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if self.kind != "grn" and (self.aggregation, self.normaliser, self.residual) != ("l2", "mean", True):
            raise ValueError(
                f"response is {self.kind!r}, which has no grn_aggregation, grn_normaliser, grn_residual; leave them out"
            )

    @property
    def name(self) -> str:
        """The slot's name in a block: GRN's is the official one."""
        return "grn" if self.kind == "grn" else "response"

    def build(self, dim: int) -> nn.Module:
        """The module for `dim` channels."""
        if self.kind == "grn":
            return GRN(dim, self.aggregation, self.normaliser, self.residual)
        kinds = {"none": Nothing, "lrn": LRN, "bn": ResponseBatchNorm, "ln": ResponseLayerNorm, "se": SE, "cbam": CBAM}
        return kinds[self.kind](dim)


class GRN(nn.Module):
    """Global response normalisation (paper, algorithm 1): each channel is scaled by its share of the image's energy.

    `gamma` and `beta` are (1, 1, 1, C). With the residual both start at 0, so GRN starts as the identity; without it
    gamma starts at 1, or nothing would pass. Statistics are those of each image over the sites the layout counts;
    `across_images` is the form of the official PyTorch pre-training code, which mixes all images of a batch.
    """

    def __init__(self, dim: int, aggregation: str = "l2", normaliser: str = "mean", residual: bool = True):
        super().__init__()
        self.aggregation, self.normaliser, self.residual = aggregation, normaliser, residual
        self.initial_constants = {"gamma": 0.0 if residual else 1.0}
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.across_images = False

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        published = (self.aggregation, self.normaliser, self.residual) == ("l2", "mean", True)
        every_site_counts = layout.sites(x) * x.shape[0] * x.shape[-1] == x.numel()
        if published and every_site_counts and not torch.compiler.is_compiling():
            return grn(x, self.gamma.flatten(), self.beta.flatten(), self.across_images, EPS)
        scale = self.gamma.flatten() * self._share(self._aggregate(x, layout))
        if self.residual:
            scale = 1 + scale
        # Rounded after the product: as a bf16 number, a scale of 1.010 is 1.008 for every site of the channel.
        return torch.addcmul(self.beta.flatten(), x, scale).to(x.dtype)

    def _aggregate(self, x: Tensor, layout: Layout) -> Tensor:
        if self.aggregation == "l2":
            return layout.energy(x, self.across_images)
        if self.aggregation == "average":
            return layout.mean(x, self.across_images)
        sites = layout.sites(x) * (x.shape[0] if self.across_images else 1)
        return layout.mean(x.abs(), self.across_images) * sites

    def _share(self, energy: Tensor) -> Tensor:
        if self.normaliser == "sum":
            return energy / (energy.sum(-1, keepdim=True) + EPS)
        mean = energy.mean(-1, keepdim=True)
        if self.normaliser == "mean":
            return energy / (mean + EPS)
        if self.normaliser == "inverse":
            return 1 / (mean + EPS)
        return (energy - mean) * (energy.var(-1, correction=0, keepdim=True) + EPS).rsqrt()


class Nothing(nn.Module):
    """An empty slot: ConvNeXt V1."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x


class LRN(nn.Module):
    """Local response normalisation over 5 neighbouring channels, with the constants of Krizhevsky et al. 2012, 3.3."""

    def __init__(self, dim: int, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        squares = _wide(x).square().flatten(0, -2)
        around = F.avg_pool1d(squares[None], self.size, stride=1, padding=self.size // 2)[0] * self.size
        return (x * (self.k + self.alpha * around).pow(-self.beta).view(x.shape)).to(x.dtype)


class ResponseLayerNorm(nn.Module):
    """Over the channels of each site."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class ResponseBatchNorm(nn.Module):
    """Each channel by its mean and variance over the sites of the batch that count; in evaluation, by running ones.

    What `forward` sees is noted in `seen` and enters the buffers only by `update_running`, which the model calls once
    per forward: a block under activation checkpointing runs twice. The batch is the one this process is given. That
    statistics of equal slots give equal buffers on any number of processes is up to the engine.
    """

    momentum = 0.1

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        wide = _wide(x)
        if self.training:
            mean = layout.mean(wide, across_images=True)
            variance = layout.mean((wide - mean).square(), across_images=True)
            count = layout.sites(x) * x.shape[0]
            self.seen = (mean.detach().flatten(), variance.detach().flatten() * (count / max(count - 1, 1)))
        else:
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * (variance + EPS).rsqrt()
        return ((wide - mean) * scale + self.bias).to(x.dtype)

    @torch.no_grad()
    def update_running(self) -> None:
        """Move the running statistics towards those of the last forward."""
        if self.training and self.seen is not None:
            self.running_mean.lerp_(self.seen[0].to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(self.seen[1].to(self.running_var.dtype), self.momentum)
            self.seen = None


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): each channel by a gate computed from all channels' means."""

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Linear(dim, max(dim // reduction, 1))
        self.fc2 = nn.Linear(max(dim // reduction, 1), dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return x * self.gate(layout.mean(x).to(x.dtype)).sigmoid().to(x.dtype)

    def gate(self, pooled: Tensor) -> Tensor:
        """Pooled channels (N, 1..., C) to the gate's logits."""
        return self.fc2(F.relu(self.fc1(pooled)))


class CBAM(SE):
    """Convolutional block attention (Woo et al. 2018): a gate on channels from their means and maxima, then one on
    sites by a 7x7 convolution over each site's mean and maximum."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        pooled = self.gate(layout.mean(x).to(x.dtype)) + self.gate(layout.maximum(x))
        x = x * pooled.sigmoid().to(x.dtype)
        ends = torch.stack((x.mean(-1), x.amax(-1)), -1)
        return x * layout.convolve(self.conv, ends).sigmoid().to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
