"""The Triton kernels on a CPU: their arithmetic by Triton's interpreter, and that they compile for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

# float64 shows that the sums are the right ones; the others are bounded by the rounding of their results and, in the
# weight's gradient, of fp32 sums. float16 stands for bfloat16 too, which the interpreter's products cannot do.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=SLOW), pytest.param("float16", marks=SLOW)])
def test_kernels_equal_torch(dtype):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_large_kernel_check.py")), dtype],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for errors in json.loads(result.stdout):
        assert all(error <= TOLERANCES[dtype] for error in errors.values()), errors


@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), pytest.param("fp32", 80, marks=SLOW)])
def test_kernels_compile_to_matrix_products_without_atomics(dtype, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, it warns
    import triton.language as tl
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.kernels import triton_large_kernel as kernels

    fixed = {"WIDE": tl.float32, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    maps = dict.fromkeys(("x", "weight", "y", "gradient"), f"*{dtype}") | {"parts": "*fp32"}
    for kernel, more in (
        (kernels.convolve_lines_kernel, {}),
        (kernels.correlate_lines_kernel, {"SPLIT": kernels.SPLIT}),
    ):
        constants = fixed | more
        signature = {name: "constexpr" if name in constants else maps.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        ptx = build(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", ptx)
        if dtype == "bf16":
            assert re.search(r"\b(w?gmma|mma)\.", ptx), "the products do not run on matrix units"
