"""The Triton kernels of large convolutions on a CPU: equal by Triton's interpreter, and compiled for GPUs."""

import re

import pytest

from tests.unit.kernels.triton_programs import compile_to_ptx, interpret

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

# float64 shows that the sums are the right ones; the others are bounded by the rounding of their results and, in the
# weight gradient, of fp32 sums. float16 stands for bfloat16 too, whose products the interpreter cannot compute.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3}
SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_torch(dtype):
    for case in interpret("triton_large_kernel_check", dtype)[dtype]:
        assert all(error <= TOLERANCES[dtype] for error in case.values()), case


@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), pytest.param("fp32", 80, marks=SLOW)])
def test_kernels_compile_to_matrix_products_without_atomics(dtype, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, it warns
    import triton.language as tl

    from pipeline.kernels import triton_large_kernel as kernels

    fixed = {"WIDE": tl.float32, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    types = dict.fromkeys(("x", "weight", "y", "gradient"), f"*{dtype}") | {"parts": "*fp32"}
    for kernel, constants in (
        (kernels.convolve_lines_kernel, fixed),
        (kernels.correlate_lines_kernel, fixed | {"SPLIT": kernels.SPLIT}),
    ):
        ptx = compile_to_ptx(kernel, constants, types, capability)
        assert not re.search(r"\b(atom|red)\.", ptx)
        if dtype == "bf16":
            assert re.search(r"\b(w?gmma|mma)\.", ptx), "the products do not run on matrix units"
