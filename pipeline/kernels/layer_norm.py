"""LayerNorm between a depthwise convolution and a linear layer; the plain reference is nn.LayerNorm.

On a GPU, autocast's LayerNorm casts bf16 features to fp32 and returns fp32, and the linear layer casts them back: 20
bytes a value forward, 32 backward. One kernel with bf16 in and out moves 4 and 6. Fusing it into the convolution would
save 2 more of the forward pass, because the backward pass needs both results in memory; but a program of the
convolution holds 64 channels of a site, not all 352 to 2816.
"""

import torch
from torch import Tensor, nn

from pipeline.kernels.precision import autocast_dtype, sum_dtype
from pipeline.kernels.triton_support import runs_triton


def normalise_sites(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply LayerNorm to features (..., C): by the reference, or where `runs_triton` in the type of autocast."""
    if not runs_triton(x.device):
        return norm(x)
    sites = x.to(autocast_dtype(x)).flatten(0, -2)
    return _layer_norm(sites, norm.weight, norm.bias, norm.eps)[0].view(x.shape)


@torch.library.custom_op("fcmae::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, means and inverse deviations. Bytes: reads x, writes y and two fp32 numbers per site."""
    from pipeline.kernels.triton_layer_norm import forward_layer_norm

    return forward_layer_norm(x.contiguous(), weight, bias, eps)


@torch.library.custom_op("fcmae::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. Bytes: reads x, grad_y and two fp32 numbers per site, writes grad_x;
    writes and reads at most 256 times two fp32 numbers per channel."""
    from pipeline.kernels.triton_layer_norm import backward_layer_norm

    grads = backward_layer_norm(grad_y.contiguous(), x.contiguous(), weight, mean, deviation)
    return grads[0], grads[1].to(weight.dtype, copy=True), grads[2].to(weight.dtype, copy=True)


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    mean, deviation = (x.new_empty(x.shape[0], dtype=sum_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), mean, deviation


@_layer_norm_backward.register_fake
def _(grad_y, x, weight, mean, deviation):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, *_):
    return *_layer_norm_backward(grad_y, *ctx.saved_tensors), None


_layer_norm.register_autograd(_gradients, setup_context=_save_inputs)
