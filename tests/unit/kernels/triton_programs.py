"""Triton kernels on a machine without a GPU: run by Triton's interpreter, or compiled to PTX."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[3]


def interpret(check: str, *dtypes: str) -> dict[str, list[dict[str, float]]]:
    """Run a module of this folder in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

    Returns:
        The largest relative error of each result, for each dtype and case.
    """
    result = subprocess.run(
        [sys.executable, "-m", f"tests.unit.kernels.{check}", *dtypes],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def largest_errors(names: tuple[str, ...], exact: list, results: list) -> dict[str, float]:
    """Compare the results of a check with the exact ones, relative to the largest number of each."""
    return {
        name: ((result.double() - expected).abs().max() / expected.abs().max()).item()
        for name, expected, result in zip(names, exact, results, strict=True)
    }


def surround_by_nan(x: Tensor) -> Tensor:
    """Return a copy of `x` with 64 rows of NaN before and behind it in memory.

    A kernel that reads out of bounds then gives NaN. A type without NaN gets its largest number instead.
    """
    margin = 64 * x.shape[-1]
    spoiled = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    memory = torch.full((x.numel() + 2 * margin,), spoiled, dtype=x.dtype)
    memory[margin:-margin] = x.flatten()
    return memory[margin:-margin].view(x.shape)


def assert_close_in_double(errors: dict[str, float]) -> None:
    """Refuse errors beyond the rounding of float64, and NaN."""
    assert all(error <= 1e-13 for error in errors.values()), errors


def compile_to_ptx(kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int) -> str:
    """Compile a kernel for a CUDA capability; arguments in neither `constants` nor `types` are i32."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return build(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
