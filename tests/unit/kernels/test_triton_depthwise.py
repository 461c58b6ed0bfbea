"""The Triton kernels on a CPU: their arithmetic by Triton's interpreter, and that they compile for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

# float64 shows that the sums are the right ones; the others are bounded by the rounding of their results, which is
# 2^-9 of each number for bf16, and of the 49 (fp32 sums of the weight's gradient: all) terms added.
TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def errors() -> dict[str, list[dict[str, float]]]:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_check.py")), *TOLERANCES],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_scatter(errors, dtype):
    for found in errors[dtype]:
        assert all(error <= TOLERANCES[dtype] for error in found.values()), found


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_atomics(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, it warns
    import triton.language as tl
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.kernels import triton_depthwise

    fixed = {"WINDOW": 7, "WIDE": tl.float32, "SITES": triton_depthwise.SITES, "CHANNELS": triton_depthwise.CHANNELS}
    features = dict.fromkeys(("x", "taps", "bias", "y", "gradient"), "*bf16") | {"halo": "*i64", "parts": "*fp32"}
    for kernel, more in (
        (triton_depthwise.convolve_tokens_kernel, {"BIAS": True}),
        (triton_depthwise.correlate_tokens_kernel, {"SPLIT": triton_depthwise.SPLIT}),
    ):
        constants = fixed | more
        signature = {name: "constexpr" if name in constants else features.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = build(source, target=GPUTarget("cuda", capability, 32))
        assert ".version" in built.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", built.asm["ptx"])
