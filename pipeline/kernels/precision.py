"""The type in which sums and statistics are taken: fp32 at least, because squares overflow fp16 and round in bf16."""

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums of numbers of `dtype`: float64 for float64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """`x` in the type for its sums; the same tensor if it has that type."""
    return x.to(sum_dtype(x.dtype))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type to which autocast casts `x` before a custom operator, which autocast does not see into.

    Without autocast, and for float64, it is the type of `x`. Meta tensors take CUDA's autocast, because they stand for
    those of a GPU; torch has no autocast of its own for them.
    """
    device = "cuda" if x.is_meta else x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
