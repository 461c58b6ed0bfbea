"""Which device takes Triton kernels, and switches: meta tensors stand for a GPU, or every choice is plain torch."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pipeline.kernels.precision import sum_dtype

P, R = ParamSpec("P"), TypeVar("R")

# Of the whole process, not of a thread, because autograd recomputes checkpointed blocks in threads of its own.
_SWITCHES = {"meta_stands_for_gpu": False, "plain_kernels": False}


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels are chosen on this device.

    They are on a GPU if Triton is installed and finds the C compiler that it starts for each kernel, with Python.h,
    and on meta tensors under `meta_stands_for_gpu`; under `plain_kernels` they never are.
    """
    if _SWITCHES["plain_kernels"]:
        return False
    if device.type == "meta":
        return _SWITCHES["meta_stands_for_gpu"]
    return device.type == "cuda" and _compiles_triton()


def takes_plain_kernels() -> bool:
    """Whether `plain_kernels` is on."""
    return _SWITCHES["plain_kernels"]


@contextmanager
def meta_stands_for_gpu() -> Iterator[None]:
    """Choose kernels for meta tensors as for a GPU, whether Triton is installed or not: their operators only return
    shapes there."""
    with _switched("meta_stands_for_gpu"):
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Choose the plain torch reference wherever there is a choice, on every device."""
    with _switched("plain_kernels"):
        yield


@contextmanager
def _switched(name: str) -> Iterator[None]:
    before, _SWITCHES[name] = _SWITCHES[name], True
    try:
        yield
    finally:
        _SWITCHES[name] = before


@torch.compiler.assume_constant_result
def _compiles_triton() -> bool:
    return _finds_compiler()


@cache  # it is asked for at every block, and searching PATH takes a tenth of a millisecond
def _finds_compiler() -> bool:
    return not missing_compiler(torch.device("cuda"))


def missing_compiler(device: torch.device) -> str:
    """Name what torch.compile lacks on this device, and Triton on a GPU; "" if nothing.

    Triton compiles a piece of C against Python.h for each kernel, torch.compile C++ on a CPU.
    """
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton is not installed"
        compiler, name = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc"), "C compiler (gcc)"
    else:
        compiler, name = os.environ.get("CXX") or shutil.which("g++"), "C++ compiler (g++)"
    if not compiler:
        return f"no {name} is on PATH"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # the scheme that Triton looks in
    return "" if header.is_file() else f"{header} is missing (Debian: python3-dev)"


def on_own_gpu(launch: Callable[P, R]) -> Callable[P, R]:
    """Have a function launch its Triton kernels on the GPU of its first tensor: Triton takes the current GPU."""

    @wraps(launch)
    def launch_there(*arguments: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device_of(next(each for each in arguments if isinstance(each, Tensor))):
            return launch(*arguments, **options)

    return launch_there


def triton_sum_type(dtype: torch.dtype) -> Any:
    """`sum_dtype` as a type of Triton."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64}[sum_dtype(dtype)]
