"""RoIAlign and suppression as Triton kernels on a CPU: equal by Triton's interpreter, and compiled for GPUs."""

import pytest

from tests.unit.kernels.triton_programs import interpret
from tools.bench.gpu_code import compile_launches
from tools.bench.kernel_code import region_align, suppression

pytest.importorskip("triton", reason="pip install 'fcmae[kernels]'")

TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtypes", [["float64"], ["float32", "bfloat16"]], ids=["double", "narrow"])
def test_kernels_equal_the_loops_for_cpus(dtypes):
    for dtype, cases in interpret("triton_regions_check", *dtypes).items():
        for case in cases:
            assert all(error <= TOLERANCES[dtype] for error in case.values()), case


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_atomics_and_spills(capability, triton_cache):
    for run in (region_align, lambda: suppression(2000)):
        for name, code in compile_launches(run, capability).items():
            assert (code.spills, code.atomics) == (0, 0), name
            if name != "keep_in_order_kernel":  # it looks for the next box in all threads
                assert not any(loop.barriers for loop in code.loops), name
