"""Global response normalisation where every site counts, with its gradient by hand.

Autograd's chain keeps several tensors as large as the features, in fp32 under bf16, and passes over memory for each.
This keeps the features alone, and works through an image or a few while they are in the cache. Statistics are at least
fp32. Under torch.compile the plain chain is the better form: the compiler fuses it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_BYTES = 1 << 20  # worked on at a time on a CPU: about one core's second-level cache


def grn(x: Tensor, gamma: Tensor, beta: Tensor, across_images: bool, eps: float) -> Tensor:
    """x (N, sites..., C) times 1 + gamma * share, plus beta, both (C,); share is each channel's L2 norm over the sites
    of an image (or of the batch), divided by its mean over channels plus `eps`. A channel of zeros has the gradient of
    norm 0."""
    return _GRN.apply(x, gamma, beta, across_images, eps)


class _GRN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, across_images, eps):
        rows = x.flatten(1, -2)
        square = rows.new_empty(len(rows), 1, rows.shape[-1], dtype=torch.promote_types(rows.dtype, torch.float32))
        for part, here in _parts(rows, square):
            torch.sum(_wide(part).square(), 1, keepdim=True, out=here)
        energy = (square.sum(0, keepdim=True) if across_images else square).sqrt()
        scale = 1 + gamma * (energy / (energy.mean(-1, keepdim=True) + eps))
        y = torch.empty_like(rows)
        for part, out, by in _parts(rows, y, scale.expand(len(rows), -1, -1)):
            torch.addcmul(beta, part, by, out=out)
        ctx.save_for_backward(x, energy, gamma)
        ctx.eps = eps
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, energy, gamma = ctx.saved_tensors
        rows, gradient = x.flatten(1, -2), gradient.reshape(len(x), -1, x.shape[-1])
        product, total = (energy.new_empty(len(rows), 1, rows.shape[-1]) for _ in range(2))
        for part, above, here, there in _parts(rows, gradient, product, total):
            torch.sum(_wide(part) * above, 1, keepdim=True, out=here)
            torch.sum(above, 1, keepdim=True, dtype=total.dtype, out=there)
        if len(energy) == 1:
            product = product.sum(0, keepdim=True)
        mean = energy.mean(-1, keepdim=True) + ctx.eps
        share = energy / mean
        of_share = gamma * product
        of_energy = (of_share - (of_share * share).mean(-1, keepdim=True)) / mean
        # d energy / d x is x / energy; where all x are 0, so is this.
        along = torch.where(energy > 0, of_energy / energy, 0).expand(len(rows), -1, -1)
        scale = (1 + gamma * share).expand(len(rows), -1, -1)
        of_x = torch.empty_like(rows)
        for part, above, out, by, toward in _parts(rows, gradient, of_x, scale, along):
            torch.addcmul(above * by, part, toward, out=out)
        of_gamma, of_beta = (product * share).sum((0, 1)), total.sum((0, 1))
        return of_x.view(x.shape), of_gamma.to(gamma.dtype), of_beta.to(gamma.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some images of each tensor at a time; all of them on a GPU."""
    images = len(rows) if rows.is_cuda else max(CACHE_BYTES // (rows[0].numel() * rows.element_size()), 1)
    return zip(*(tensor.split(images) for tensor in (rows, *others)), strict=True)
