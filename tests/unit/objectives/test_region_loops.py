"""The loops of a detector on the CPU are compiled before any time-out runs."""

import torch

from pipeline.kernels import numba_regions
from pipeline.kernels.region_align import crop_masks, region_align
from pipeline.kernels.suppression import suppress
from pipeline.objectives.region_loops import compile_regions

LOOPS = ("weigh_axis", "pool_regions", "spread_regions", "pool_bits", "keep_boxes")


def overloads() -> list[set]:
    return [set(getattr(numba_regions, name).overloads) for name in LOOPS]


def test_nothing_is_left_to_compile_for_training_and_evaluation():
    compile_regions()
    known = overloads()
    assert all(known)
    boxes = torch.tensor([[[0.0, 0, 9, 9], [1, 2, 5, 7]]])
    for dtype in (torch.float32, torch.bfloat16):
        maps = [torch.zeros(1, 3, 8 // stride, 8 // stride, dtype=dtype, requires_grad=True) for stride in (1, 2)]
        region_align(maps, (1, 2), boxes, 7).sum().backward()
    crop_masks(torch.zeros(2, 8, 1, dtype=torch.uint8), 8, torch.tensor([0, 1]), boxes[0], 28)
    suppress(boxes, torch.ones(1, 2, dtype=torch.bool), 0.5)
    assert overloads() == known
