"""BatchNorm that activation checkpointing cannot count twice, and its exact folding into the layer beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.response_norm import ResponseBatchNorm


class BatchNorm(nn.BatchNorm2d):
    """Over (N, C, ...), with torch's names, eps of 1e-5 and momentum of 0.1.

    What `forward` sees is kept in `seen` and enters the buffers only by `update_running`, which the model calls once
    per forward: a block under activation checkpointing runs twice. Statistics are fp32 at least. The batch is the one
    this process is given; that equal slots give equal buffers on any number of processes is up to the engine.
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self.training:
            mean, variance = self.running_mean.to(dtype), self.running_var.to(dtype)
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        # With a momentum of 1 buffers become the statistics of this batch: they come at no cost.
        self.seen = (torch.zeros_like(weight.detach()), torch.ones_like(weight.detach()))
        return F.batch_norm(x, *self.seen, weight, bias, training=True, momentum=1.0, eps=self.eps)

    update_running = ResponseBatchNorm.update_running


def counts_batches(model: nn.Module) -> bool:
    """Whether the model has running statistics, so that a forward must see one slot."""
    return any(isinstance(module, BatchNorm | ResponseBatchNorm) for module in model.modules())


def update_running_statistics(model: nn.Module) -> None:
    """To be called at the end of a model's forward, outside of what activation checkpointing runs twice."""
    for module in model.modules():
        if isinstance(module, BatchNorm | ResponseBatchNorm):
            module.update_running()


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the norm does in evaluation: scale and shift of each channel (C,), in float64."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


@torch.no_grad()
def fold_after(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution equal to `norm(conv(x))`; the same one if `norm` is no BatchNorm."""
    if not isinstance(norm, BatchNorm):
        return conv
    scale, shift = affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias.double() * scale
    return with_values(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


@torch.no_grad()
def fold_before(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> nn.Conv2d | nn.Linear:
    """A layer equal to `layer(scale * x + shift)`, for linear layers and 1x1 convolutions: padding would not shift."""
    weight = layer.weight.double()
    bias = weight.flatten(1) @ shift
    bias = bias if layer.bias is None else bias + layer.bias.double()
    return with_values(layer, weight * scale.view(1, -1, *[1] * (weight.ndim - 2)), bias)


@torch.no_grad()
def with_values(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> nn.Conv2d | nn.Linear:
    """The layer's like with a bias and other values; a kernel may be larger, and is then padded to keep the size."""
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features, **place)
    else:
        size = tuple(weight.shape[2:])
        padding = layer.padding if size == layer.kernel_size else tuple(side // 2 for side in size)
        channels = (layer.in_channels, layer.out_channels)
        new = nn.Conv2d(*channels, size, layer.stride, padding, groups=layer.groups, **place)
    new.weight.copy_(weight)
    new.bias.copy_(bias)
    return new
