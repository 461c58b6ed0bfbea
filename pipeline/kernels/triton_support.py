"""Whether Triton's kernels can run: on a GPU, with the package, and with a C compiler, which it starts for each."""

import os
import shutil
from importlib.util import find_spec

import torch


def runs_triton(device: torch.device) -> bool:
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None
