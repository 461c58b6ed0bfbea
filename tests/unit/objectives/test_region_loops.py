"""The loops of a detector on the CPU are compiled before any time-out runs."""

import pytest
import torch

from pipeline.kernels import numba_regions
from pipeline.kernels.region_align import crop_masks, region_align
from pipeline.kernels.suppression import suppress
from pipeline.objectives.region_loops import compile_regions

LOOPS = ("pool_regions", "spread_regions", "pool_bits", "keep_boxes")  # code from disk brings weigh_axis along


def overloads() -> list[set]:
    return [set(getattr(numba_regions, name).overloads) for name in LOOPS]


@pytest.mark.parametrize("double", [False, True])
def test_nothing_is_left_to_compile_for_training_and_evaluation(double):
    compile_regions(double)
    known = overloads()
    assert all(known)
    dtypes = [torch.float64] if double else [torch.float32, torch.bfloat16]
    boxes = torch.tensor([[[0.0, 0, 9, 9], [1, 2, 5, 7]]], dtype=dtypes[0])
    for dtype in dtypes:
        maps = [torch.zeros(1, 3, 8 // stride, 8 // stride, dtype=dtype, requires_grad=True) for stride in (1, 2)]
        region_align(maps, (1, 2), boxes, 7).sum().backward()
    crop_masks(torch.zeros(2, 8, 1, dtype=torch.uint8), 8, torch.tensor([0, 1]), boxes[0], 28)
    suppress(boxes, torch.ones(1, 2, dtype=torch.bool), 0.5)
    assert overloads() == known
