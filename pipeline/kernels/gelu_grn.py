"""GELU and then GRN as one operator for GPUs; the plain reference is `F.gelu` and the formula in response_norm.py.

GRN.after_linear in models/response_norm.py chooses: this operator where `runs_triton`, else the reference.
"""

import torch
from torch import Tensor

from pipeline.kernels.precision import autocast_dtype, sum_dtype


def gelu_grn(x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, across_images: bool, eps: float) -> Tensor:
    """Return GRN of GELU(x), in the type of autocast; statistics are at least fp32, and only `x` is kept for backward.

    Args:
        x: features (N, sites..., C), the same number of sites for each image.
        bias: (C,), already added to `x` without a gradient. The kernel that makes the gradient of `x` also sums it over
            the sites, which is the gradient of `bias`; otherwise another kernel would read the gradient of `x` again.
        gamma, beta, across_images, eps: see `grn`.
    """
    features = x.to(autocast_dtype(x)).flatten(1, -2)
    return _gelu_grn(features, bias, gamma, beta, across_images, eps)[0].view(x.shape)


@torch.library.custom_op("fcmae::gelu_grn", mutates_args=())
def _gelu_grn(
    x: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, across_images: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the output and each channel's norm. Bytes: reads x twice, writes y; for every 256 sites of an image it
    writes and reads one fp32 number per channel."""
    from pipeline.kernels.triton_gelu_grn import forward_gelu_grn

    return forward_gelu_grn(x.contiguous(), gamma, beta, across_images, eps)


@torch.library.custom_op("fcmae::gelu_grn_backward", mutates_args=())
def _gelu_grn_backward(
    grad_y: Tensor, x: Tensor, norm: Tensor, gamma: Tensor, across_images: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, bias (in fp32), gamma and beta. Bytes: reads x and grad_y twice, writes grad_x; for
    every 256 sites of an image it writes and reads three fp32 numbers per channel."""
    from pipeline.kernels.triton_gelu_grn import backward_gelu_grn

    grad_x, grad_bias, grad_gamma, grad_beta = backward_gelu_grn(
        grad_y.contiguous(), x.contiguous(), norm, gamma, across_images, eps
    )
    return grad_x, grad_bias, grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype)


@_gelu_grn.register_fake
def _(x, bias, gamma, beta, across_images, eps):
    rows = 1 if across_images else x.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows, x.shape[2], dtype=sum_dtype(x.dtype))


@_gelu_grn_backward.register_fake
def _(grad_y, x, norm, gamma, across_images, eps):
    return x.new_empty(x.shape), norm.new_empty(gamma.shape), *(gamma.new_empty(gamma.shape) for _ in range(2))


def _save_inputs(ctx, inputs, output):
    x, bias, gamma, _, ctx.across_images, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], gamma)
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, _):
    grad_x, grad_bias, *others = _gelu_grn_backward(grad_y, *ctx.saved_tensors, ctx.across_images, ctx.eps)
    return grad_x, grad_bias.to(ctx.bias_dtype), *others, None, None


_gelu_grn.register_autograd(_gradients, setup_context=_save_inputs)
