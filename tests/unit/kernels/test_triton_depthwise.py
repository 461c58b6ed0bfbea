"""The depthwise kernels on a CPU: equal by Triton's interpreter, and compiled for GPUs within limits."""

import pytest
import torch

from tests.unit.kernels.triton_programs import interpret
from tools.bench.gpu_code import compile_launches
from tools.bench.kernel_code import dense_depthwise, instructions_per_tap, packed_depthwise

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

# float64 shows that the sums are the right ones; the others are bounded by the rounding of their results, which is
# 2^-9 of each number for bf16, and of the terms added in fp32.
TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}
# Instructions for a tap of 32 sites x 64 channels on sm_90. 128 threads need 16 multiplications each, so no fewer will
# do. Releases of Triton and GPUs differ by 5-15 %.
LIMITS = {"convolve_rows_kernel": 75, "correlate_rows_kernel": 90}


@pytest.fixture(scope="module")
def errors():
    return interpret("triton_check", *TOLERANCES)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_torch(dtype, errors):
    for case in errors[dtype]:
        assert all(error <= TOLERANCES[dtype] for error in case.values()), case


@pytest.mark.slow
def test_kernels_equal_torch_at_every_stage_of_every_model():
    for case in interpret("triton_check", "float64", "models")["float64"]:
        assert all(error <= TOLERANCES["float64"] for error in case.values()), case


def check_code(run, capability):
    for name, code in compile_launches(run, capability).items():
        (loop,) = code.loops
        assert (loop.barriers, loop.spills, code.spills, code.atomics) == (0, 0, 0, 0), name
        assert instructions_per_tap(loop) <= LIMITS[name] * (1 if capability == 90 else 1.15), name


@pytest.mark.parametrize("side", [pytest.param(8, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 1])
def test_packed_kernels_have_few_instructions_and_neither_barriers_nor_spills(side, triton_cache):
    check_code(lambda: packed_depthwise(side), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_have_few_instructions_and_neither_barriers_nor_spills(capability, triton_cache):
    for side in (8, 7, 4, 3, 2, 1):
        check_code(lambda side=side: packed_depthwise(side), capability)
    check_code(dense_depthwise, capability)


def test_features_beyond_int32_are_addressed_in_64_bits():
    from tools.bench.gpu_code import record_launches

    for images, expected in ((64, "int32"), (64 * 80, "int64")):
        with record_launches() as launches:
            packed_depthwise(8, images=images)
        assert {str(launch.arguments["INDEX"]) for launch in launches} == {expected}
    assert torch.iinfo(torch.int32).max < 64 * 80 * 20 * 64 * 352
