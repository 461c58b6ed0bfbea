"""Non-maximum suppression: of boxes that overlap, keep the one with the highest score.

`suppress` is exact and greedy, ties by place: a compiled loop on the CPU (numba_regions.py), a Triton kernel on GPUs
(triton_suppression.py), or a loop of torch operators. `soft_suppress` (Bodla et al., Soft-NMS, 2017) lowers scores
instead, for testing. Shapes depend on shapes alone, so nothing waits for the device.
"""

import torch
from torch import Tensor

from pipeline.kernels.triton_support import runs_triton


def suppress(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return which valid boxes are kept, (B, K) bool: those that no kept box before them overlaps by more than
    `threshold`.

    An invalid box suppresses nothing.

    Args:
        boxes: (B, K, 4) x1, y1, x2, y2, sorted by falling score (stably, so that equal scores keep their order).
        valid: (B, K) bool.
        threshold: intersection over union, 0 or more; it is computed in the type of the boxes.
    """
    return _suppress(boxes.detach(), valid, threshold)


@torch.library.custom_op("fcmae::suppress", mutates_args=())
def _suppress(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Bytes: reads the boxes and writes one byte for each; the kernel reads them again for each kept box."""
    corners = boxes.permute(0, 2, 1).contiguous()
    if boxes.device.type == "cpu":
        from pipeline.kernels.numba_regions import keep_boxes

        keep = valid.clone(memory_format=torch.contiguous_format)
        limit = torch.tensor(threshold, dtype=boxes.dtype).numpy()[()]
        for image in range(len(keep)):
            keep_boxes(corners[image].numpy(), limit, keep[image].numpy())
        return keep
    if runs_triton(boxes.device):
        from pipeline.kernels.triton_suppression import keep_in_order

        return keep_in_order(corners, valid, threshold)
    return _suppress_plainly(corners, valid, threshold)


@_suppress.register_fake
def _(boxes, valid, threshold):
    return valid.new_empty(valid.shape)


def _suppress_plainly(corners: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Suppress boxes of corners (B, 4, K) by K operators."""
    over = _overlap(corners[..., :, None], corners[..., None, :]) > threshold
    keep = valid.clone()
    for i in range(keep.shape[1] - 1):
        keep[:, i + 1 :] &= ~(over[:, i, i + 1 :] & keep[:, i, None])
    return keep


def _overlap(one: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over the union of boxes whose corners are dim 1; 0 or NaN if both are empty."""
    (left, top, right, bottom), (x1, y1, x2, y2) = one.unbind(1), others.unbind(1)
    width = (torch.minimum(right, x2) - torch.maximum(left, x1)).clamp(min=0)
    both = width * (torch.minimum(bottom, y2) - torch.maximum(top, y1)).clamp(min=0)
    return both / ((right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - both)


def soft_suppress(
    boxes: Tensor, scores: Tensor, number: int, threshold: float = 0.3, lowest: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Pick `number` boxes one after the other, always the one with the highest score, the first of equals.

    Each pick lowers the scores of the boxes that it overlaps by more than `threshold`: an overlap of u multiplies them
    by 1 - u. As scores only fall, picks come in the order of their final scores. The rule and the defaults are mmcv's
    "linear".

    Args:
        boxes: (B, K, 4) x1, y1, x2, y2, in any order.
        scores: (B, K), 0 for invalid boxes.
        threshold: intersection over union from 0 to 1.
        lowest: boxes with a lower score are never picked.

    Returns:
        The places of the picked boxes (B, number) and their lowered scores, 0 where there are no more boxes.
    """
    corners = boxes.detach().permute(0, 2, 1).contiguous()
    scores, picks = scores.detach().clone(), []
    for _ in range(number):
        score, pick = scores.max(1, keepdim=True)
        picks.append((pick, torch.where(score >= lowest, score, 0)))
        overlap = _overlap(corners.gather(2, pick[:, None].expand(-1, 4, -1)), corners)
        scores = (scores * torch.where(overlap > threshold, 1 - overlap, 1)).scatter(1, pick, 0)
    places, finals = zip(*picks, strict=True)
    return torch.cat(places, 1), torch.cat(finals, 1)
