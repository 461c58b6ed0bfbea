"""BatchNorm whose running statistics move once per step, over norm groups that may span ranks, and how to fold it into
the layer before or after it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.precision import sum_dtype
from pipeline.models.shared_norm import normalise_over_ranks


class RunningStatistics:
    """The buffers of a BatchNorm, which only `update_running` moves.

    A block under activation checkpointing runs its forward twice, so a forward must not change buffers: it leaves its
    statistics in `seen`, and the model calls `update_running_statistics` once at its end. A forward sees one slot; the
    engine averages the buffers over the slots of a step.
    """

    momentum = 0.1
    seen: tuple[Tensor, Tensor] | None = None
    """Mean and unbiased variance (C,) of the last forward in training."""

    @torch.no_grad()
    def update_running(self) -> None:
        """Move the running statistics towards those of the last forward."""
        if self.training and self.seen is not None:
            self.running_mean.lerp_(self.seen[0].to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(self.seen[1].to(self.running_var.dtype), self.momentum)
            self.seen = None


class BatchNorm(RunningStatistics, nn.BatchNorm2d):
    """nn.BatchNorm2d of (N, C, ...) with statistics in at least fp32; names, eps and momentum are torch's.

    In training the images of a forward count together, or those of each norm group, see `set_norm_group`.
    """

    group_images: int | None = None
    group_ranks: dist.ProcessGroup | None = None
    regions = 1
    """Rows of x for each image: more than one behind RoIAlign."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = sum_dtype(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self.training:
            mean, variance = self.running_mean.to(dtype), self.running_var.to(dtype)
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        if self.group_images in (None, images := len(x) // self.regions):
            y, mean, variance = self._normalise(x, weight, bias)
            self.seen = (mean, variance)
            return y
        if images % self.group_images:
            raise ValueError(f"{images} images are no whole number of norm groups of {self.group_images} on this rank")
        groups = [self._normalise(group, weight, bias) for group in x.split(self.group_images * self.regions)]
        y, mean, variance = zip(*groups, strict=True)
        self.seen = (torch.stack(mean).mean(0), torch.stack(variance).mean(0))
        return torch.cat(y)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result for one norm group, and its mean and unbiased variance (C,)."""
        if self.group_ranks is not None:
            return normalise_over_ranks(x, weight, bias, self.eps, self.group_ranks)
        # With a momentum of 1 these buffers become the statistics of this batch, at no cost.
        mean, variance = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
        y = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        return y, mean, variance


def set_norm_group(model: nn.Module, images: int | None, ranks: dist.ProcessGroup | None) -> None:
    """Set over which images every BatchNorm of the model takes its statistics in training.

    Args:
        images: of this rank in each norm group; a forward sees whole groups. None counts the images of a forward.
        ranks: those that share a group, with equally many images of equal size each; None if each has its own groups.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.group_images, module.group_ranks = images, ranks


def counts_batches(model: nn.Module) -> bool:
    """Return whether the model has running statistics, so that a forward must see exactly one slot."""
    return any(isinstance(module, RunningStatistics) for module in model.modules())


def update_running_statistics(model: nn.Module) -> None:
    """Update every BatchNorm; call it at the end of a model's forward, outside of what checkpointing runs twice."""
    for module in model.modules():
        if isinstance(module, RunningStatistics):
            module.update_running()


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of each channel (C,), float64, that the norm applies in evaluation."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def fold_after(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Return a convolution equal to `norm(conv(x))` in evaluation; `conv` itself if `norm` is no BatchNorm."""
    if not isinstance(norm, BatchNorm):
        return conv
    scale, shift = affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias.double() * scale
    return with_weights(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


@torch.no_grad()
def fold_before(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> nn.Conv2d | nn.Linear:
    """Return a layer equal to `layer(scale * x + shift)`: for linear layers and 1x1 convolutions, which do not pad."""
    weight = layer.weight.double()
    bias = weight.flatten(1) @ shift
    bias = bias if layer.bias is None else bias + layer.bias.double()
    return with_weights(layer, weight * scale.view(1, -1, *[1] * (weight.ndim - 2)), bias)


@torch.no_grad()
def with_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Conv2d | nn.Linear:
    """Return a copy of the layer with this weight and bias; a larger kernel gets the padding that keeps the size."""
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features, **options)
    else:
        size = tuple(weight.shape[2:])
        padding = layer.padding if size == layer.kernel_size else tuple(side // 2 for side in size)
        channels = (layer.in_channels, layer.out_channels)
        new = nn.Conv2d(*channels, size, layer.stride, padding, groups=layer.groups, **options)
    new.weight.copy_(weight)
    new.bias.copy_(bias)
    return new
