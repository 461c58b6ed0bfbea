"""The arithmetic of a BatchNorm whose statistics are those of several ranks' images."""

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.kernels.precision import widen


@torch.compiler.disable  # collectives stay outside of compiled blocks
def normalise_over_ranks(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x (N, C, ...) by the mean and variance over the images of all `ranks`. Collective, backward too.

    Args:
        x: as large on every rank.
        weight, bias: (C,), in the type of the statistics.

    Returns:
        The result, and the mean and unbiased variance (C,), which have no gradient.
    """
    return _SharedNorm.apply(x, weight, bias, eps, ranks)


class _SharedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, ranks):
        wide, size = widen(x), ranks.size()
        variance, mean = torch.var_mean(wide, _without_channels(x), correction=0)
        # A row for each rank: each fills its own, and the sum over ranks then has all rows on every rank.
        gathered = mean.new_zeros(size, 2, len(mean))
        gathered[ranks.rank()] = torch.stack((mean, variance))
        dist.all_reduce(gathered, group=ranks)
        means, variances = gathered.unbind(1)
        mean = means.mean(0)
        # Each rank's variance is about its own mean, so no large sums of squares are subtracted.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        deviation = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, deviation)
        ctx.ranks, ctx.count = ranks, size * x.numel() // x.shape[1]
        y = (wide - _per_channel(mean, x)) * _per_channel(deviation * weight, x) + _per_channel(bias, x)
        unbiased = variance * (ctx.count / max(ctx.count - 1, 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, deviation = ctx.saved_tensors
        grad, dims = widen(grad), _without_channels(x)
        normalised = (widen(x) - _per_channel(mean, x)) * _per_channel(deviation, x)
        own = torch.stack((grad.sum(dims), (grad * normalised).sum(dims)))
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.ranks)
        shift, slope = (_per_channel(each, x) for each in sums / ctx.count)
        grad_x = (grad - shift - normalised * slope) * _per_channel(deviation * weight, x)
        return grad_x.to(x.dtype), own[1], own[0], None, None


def _without_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))
