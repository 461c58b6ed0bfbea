"""Whether Triton kernels can run on a device, and the type in which they sum."""

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch

from pipeline.kernels.precision import sum_dtype


def runs_triton(device: torch.device) -> bool:
    """Whether the device is a GPU, Triton is installed, and it finds the C compiler that it starts for each kernel."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None


def triton_sum_type(dtype: torch.dtype) -> Any:
    """`sum_dtype` as a type of Triton."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64}[sum_dtype(dtype)]
