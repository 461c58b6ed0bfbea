"""The type in which sums and statistics are taken: fp32 at least, because squares overflow fp16 and round in bf16."""

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums of numbers of `dtype`: float64 for float64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """`x` in the type for its sums; the same tensor if it has that type."""
    return x.to(sum_dtype(x.dtype))
