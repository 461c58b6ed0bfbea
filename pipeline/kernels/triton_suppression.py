"""Greedy non-maximum suppression as a Triton kernel: one program for each image, one step for each kept box.

The program holds in registers which boxes are alive, finds the first one behind the last that was kept, and clears
those that it overlaps. Divisions are rounded as on the CPU and multiplications are not fused with additions, so the
result is that of the CPU. Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1) and by the code that is
compiled for GPUs; the speed on a GPU has not been measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.triton_support import on_own_gpu


@triton.jit
def keep_in_order_kernel(corners, valid, keep, threshold, boxes, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    exists = place < boxes
    corners += image * 4 * boxes
    x1 = tl.load(corners + place, exists, 0)
    y1 = tl.load(corners + boxes + place, exists, 0)
    x2 = tl.load(corners + 2 * boxes + place, exists, 0)
    y2 = tl.load(corners + 3 * boxes + place, exists, 0)
    areas = (x2 - x1) * (y2 - y1)
    alive = tl.load(valid + image * boxes + place, exists, 0) != 0
    first = tl.min(tl.where(alive, place, BLOCK), 0)
    while first < boxes:
        left, top = tl.load(corners + first), tl.load(corners + boxes + first)
        right, bottom = tl.load(corners + 2 * boxes + first), tl.load(corners + 3 * boxes + first)
        width = tl.minimum(right, x2) - tl.maximum(left, x1)
        height = tl.minimum(bottom, y2) - tl.maximum(top, y1)
        both = tl.where((width > 0) & (height > 0), width * height, 0.0)
        union = (right - left) * (bottom - top) + areas - both
        if x1.dtype == tl.float32:
            share = tl.div_rn(both, union)  # of float64 numbers every division is rounded so
        else:
            share = both / union
        over = (both > 0) & (share > tl.load(threshold))
        alive = alive & ((place <= first) | (over == 0))
        first = tl.min(tl.where(alive & (place > first), place, BLOCK), 0)
    tl.store(keep + image * boxes + place, alive.to(tl.uint8), exists)


@on_own_gpu
def keep_in_order(corners: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return which valid boxes of contiguous corners (B, 4, K) are kept, (B, K) bool."""
    images, _, boxes = corners.shape
    keep = torch.empty(images, boxes, dtype=torch.bool, device=corners.device)
    if boxes:
        block = triton.next_power_of_2(boxes)
        limit = torch.full((1,), threshold, dtype=corners.dtype, device=corners.device)
        keep_in_order_kernel[(images,)](
            corners, valid.contiguous().view(torch.uint8), keep.view(torch.uint8), limit, boxes,
            BLOCK=block, num_warps=min(max(block // 256, 4), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return keep
