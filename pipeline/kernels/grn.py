"""Global response normalisation (GRN) with a gradient by hand; its formula also stands in models/response_norm.py.

models/response_norm.py calls this form where every site of the features counts, which is always so but for the masked
layout. Autograd would keep several tensors as large as the features, in fp32 under bf16 autocast, and pass over memory
for each. This form keeps the features alone and works through a few images at a time, while they are in the cache.
Under torch.compile the formula in response_norm.py is the better form, because the compiler fuses it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.precision import sum_dtype, widen

CACHE_BYTES = 1 << 20  # about one core's second-level cache: on a CPU, this much is worked on at a time


def grn(x: Tensor, gamma: Tensor, beta: Tensor, across_images: bool, eps: float) -> Tensor:
    """Return x * (1 + gamma * share) + beta, where share = norm / (mean of norm over the channels + eps).

    Statistics are at least fp32. The gradient of a channel of zeros takes the gradient of its norm as 0.

    Args:
        x: features (N, sites..., C).
        gamma, beta: (C,).
        across_images: take each channel's L2 norm over the sites of the whole batch instead of each image's.
        eps: 1e-6 in the paper (algorithm 1).
    """
    return _GRN.apply(x, gamma, beta, across_images, eps)


class _GRN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, across_images, eps):
        rows = x.flatten(1, -2)
        square = rows.new_empty(len(rows), 1, rows.shape[-1], dtype=sum_dtype(rows.dtype))
        for x_part, out in _parts(rows, square):
            torch.sum(widen(x_part).square(), 1, keepdim=True, out=out)
        norm = (square.sum(0, keepdim=True) if across_images else square).sqrt()
        scale = 1 + gamma * (norm / (norm.mean(-1, keepdim=True) + eps))
        y = torch.empty_like(rows)
        for x_part, scale_part, out in _parts(rows, scale.expand(len(rows), -1, -1), y):
            torch.addcmul(beta, x_part, scale_part, out=out)
        ctx.save_for_backward(x, norm, gamma)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, norm, gamma = ctx.saved_tensors
        rows, grad_y = x.flatten(1, -2), grad_y.reshape(len(x), -1, x.shape[-1])
        product, total = (norm.new_empty(len(rows), 1, rows.shape[-1]) for _ in range(2))
        for x_part, grad_part, product_out, total_out in _parts(rows, grad_y, product, total):
            torch.sum(widen(x_part) * grad_part, 1, keepdim=True, out=product_out)
            torch.sum(grad_part, 1, keepdim=True, dtype=total.dtype, out=total_out)
        if len(norm) == 1:
            product = product.sum(0, keepdim=True)
        mean = norm.mean(-1, keepdim=True) + ctx.eps
        share = norm / mean
        grad_share = gamma * product
        grad_norm = (grad_share - (grad_share * share).mean(-1, keepdim=True)) / mean
        # d norm / d x is x / norm, and 0 where all x of a channel are 0.
        along_x = torch.where(norm > 0, grad_norm / norm, 0).expand(len(rows), -1, -1)
        scale = (1 + gamma * share).expand(len(rows), -1, -1)
        grad_x = torch.empty_like(rows)
        for x_part, grad_part, scale_part, along_part, out in _parts(rows, grad_y, scale, along_x, grad_x):
            torch.addcmul(grad_part * scale_part, x_part, along_part, out=out)
        grad_gamma, grad_beta = (product * share).sum((0, 1)), total.sum((0, 1))
        return grad_x.view(x.shape), grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype), None, None


def _parts(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split all tensors into the same groups of images; on a GPU, into one group of all images."""
    images = len(rows) if rows.is_cuda else max(CACHE_BYTES // (rows[0].numel() * rows.element_size()), 1)
    return zip(*(tensor.split(images) for tensor in (rows, *others)), strict=True)
