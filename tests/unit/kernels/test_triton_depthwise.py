"""The Triton kernels of packed tokens on a CPU: equal by Triton's interpreter, and compiled for GPUs."""

import re

import pytest

from tests.unit.kernels.triton_programs import compile_to_ptx, interpret

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

# float64 shows that the sums are the right ones; the others are bounded by the rounding of their results, which is
# 2^-9 of each number for bf16, and of the 49 (fp32 sums of the weight gradient: all) terms added.
TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def errors():
    return interpret("triton_check", *TOLERANCES)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_scatter(dtype, errors):
    for case in errors[dtype]:
        assert all(error <= TOLERANCES[dtype] for error in case.values()), case


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_atomics(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, it warns
    import triton.language as tl

    from pipeline.kernels import triton_depthwise as kernels

    fixed = {"WINDOW": 7, "WIDE": tl.float32, "SITES": kernels.SITES, "CHANNELS": kernels.CHANNELS}
    types = dict.fromkeys(("x", "taps", "bias", "y", "gradient"), "*bf16") | {"halo": "*i64", "parts": "*fp32"}
    for kernel, constants in (
        (kernels.convolve_tokens_kernel, fixed | {"BIAS": True}),
        (kernels.correlate_tokens_kernel, fixed | {"SPLIT": kernels.SPLIT}),
    ):
        ptx = compile_to_ptx(kernel, constants, types, capability)
        assert ".version" in ptx
        assert not re.search(r"\b(atom|red)\.", ptx)
