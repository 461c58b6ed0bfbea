"""RoIAlign (He et al., Mask R-CNN, 2017): the features of regions of any size, as maps of bins x bins.

Each bin is the mean over a grid of samples; each sample interpolates four features. Samples more than one feature
outside of the map give 0, as in mmcv's kernel; nearer ones take the features at the border. The mean of a bilinear
product is a product of means, so a region needs two small matrices (weights of rows and of columns) and no samples.

Three forms are equal to rounding: compiled loops on the CPU (numba_regions.py), Triton on GPUs
(triton_region_align.py), and matrices in plain torch. None adds atomically, so bits repeat; none waits for the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.kernels.precision import sum_dtype, widen
from pipeline.kernels.triton_support import runs_triton

FARTHEST = 1e6  # features; a region that lies farther away, or is not finite, is empty
CHUNK = 64  # regions that the plain form works on at once
NEIGHBOURS = 6  # more samples of an adaptive grid than are within one feature: they are at least half a feature apart


def region_align(
    maps: Sequence[Tensor],
    strides: Sequence[float],
    regions: Tensor,
    bins: int,
    sampling_ratio: int = 0,
    finest: float = 56,
) -> Tensor:
    """Return the features (N, R, C, bins, bins) of regions (N, R, 4: x1, y1, x2, y2 in pixels), in the maps' type.

    Gradients flow to the maps alone, and every map gets one. A region of side s (the root of its area) is read from the
    map of level floor(log2(s / finest)), or from the nearest level. Centres of pixels lie at .5 (mmcv's `aligned`).

    Args:
        maps: (N, C, H, W) of each level, from fine to coarse.
        strides: pixels on a side of a feature of each map.
        sampling_ratio: samples of a bin along each axis; 0 is as many as the bin has features, rounded up.
        finest: regions with sides of less than twice so many pixels are read from the first map.
    """
    regions = widen(regions.detach())
    side = (regions[..., 2:] - regions[..., :2]).clamp(min=0).prod(-1).sqrt()
    level, scale = torch.zeros_like(side), torch.full_like(side, 1 / strides[0])
    for i in range(1, len(strides)):
        coarse = side / finest + 1e-6 >= 2**i
        level, scale = torch.where(coarse, i, level), torch.where(coarse, 1 / strides[i], scale)
    grids = _lay_grids(level, regions * scale[..., None], bins, sampling_ratio)
    return _region_align(list(maps), grids, bins, sampling_ratio)


def crop_masks(masks: Tensor, width: int, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut boxes (P, 4) out of their masks: (P, side, side) fp32, 1 where RoIAlign of the mask is at least 0.5, else 0.

    Args:
        masks: (T, H, bytes) uint8, `width` bits a row, the highest bit first.
        index: (P,), the number of each box's mask.
        boxes: x1, y1, x2, y2 in pixels.
    """
    grids = _lay_grids(index.to(sum_dtype(boxes.dtype)), widen(boxes.detach()), side, 0)
    return _crop_masks(masks, width, grids, side)


def _lay_grids(first: Tensor, boxes: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """Return grids (..., 7): `first`, then start, length of a bin and samples in a bin along y, and along x."""
    boxes = boxes - 0.5
    usable = (boxes.abs() < FARTHEST).all(-1, keepdim=True)  # not if NaN
    boxes = torch.where(usable, boxes, 0)
    start, length = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    step = length / bins
    samples = torch.full_like(step, sampling_ratio) if sampling_ratio else step.ceil().clamp(min=0)
    axes = torch.stack([start, step, torch.where(usable, samples, 0)], -1).flip(-2)  # (..., y and x, 3)
    return torch.cat([first[..., None], axes.flatten(-2)], -1)


@torch.library.custom_op("fcmae::region_align", mutates_args=())
def _region_align(maps: list[Tensor], grids: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """Pool the regions of grids (N, R, 7), whose first number is the level. Bytes: reads the maps once, writes the
    regions; a map of which the regions overlap is read from cache where they do."""
    images, regions = grids.shape[:2]
    if runs_triton(grids.device):
        from pipeline.kernels.triton_region_align import pool_levels

        return pool_levels([_channels_last(x) for x in maps], grids, bins).permute(0, 1, 4, 2, 3).contiguous()
    features = [_channels_last(widen(x.detach())) for x in maps]  # in other threads gradients are on
    if grids.device.type == "cpu":
        from pipeline.kernels.numba_regions import pool_regions

        pooled = features[0].new_empty(images, regions, features[0].shape[-1], bins, bins)

        def pool(image: int) -> None:
            for level, x in enumerate(features):
                pool_regions(x[image].numpy(), grids[image].numpy(), level, pooled[image].numpy())

        _each_image(pool, images)
    else:
        pooled = _pool_plainly(features, grids, bins, sampling_ratio)
    return pooled.to(maps[0].dtype).contiguous()


@torch.library.custom_op("fcmae::region_align_backward", mutates_args=())
def _region_align_backward(gradient: Tensor, grids: Tensor, sizes: list[int], sampling_ratio: int) -> list[Tensor]:
    """Return the gradients of maps with these heights and widths. Bytes: reads the gradient once for each part of a
    map that a region reaches, writes the gradients of the maps."""
    gradient = gradient.permute(0, 1, 3, 4, 2).contiguous()
    images, channels = len(gradient), gradient.shape[-1]
    shapes = [(images, *sizes[i : i + 2], channels) for i in range(0, len(sizes), 2)]
    if grids.device.type == "cpu":
        from pipeline.kernels.numba_regions import spread_regions

        wide = widen(gradient)
        features = [wide.new_zeros(shape) for shape in shapes]

        def spread(image: int) -> None:
            for level, x in enumerate(features):
                spread_regions(wide[image].numpy(), grids[image].numpy(), level, x[image].numpy())

        _each_image(spread, images)
    elif runs_triton(grids.device):
        from pipeline.kernels.triton_region_align import spread_levels

        features = spread_levels(gradient, grids, shapes)
    else:
        features = _spread_plainly(widen(gradient), grids, shapes, sampling_ratio)
    return [x.to(gradient.dtype).permute(0, 3, 1, 2) for x in features]


@torch.library.custom_op("fcmae::crop_masks", mutates_args=())
def _crop_masks(masks: Tensor, width: int, grids: Tensor, side: int) -> Tensor:
    """Pool the bits of masks at grids (P, 7), whose first number is the mask. Bytes: reads the masks once at most."""
    if grids.device.type == "cpu":
        from pipeline.kernels.numba_regions import pool_bits

        pooled = grids.new_empty(len(grids), side, side)
        pool_bits(masks.contiguous().numpy(), width, grids.numpy(), pooled.numpy())
    else:
        pooled = _pool_bits_plainly(masks, width, grids, side)
    return (pooled >= 0.5).float()


@_region_align.register_fake
def _(maps, grids, bins, sampling_ratio):
    return maps[0].new_empty(*grids.shape[:2], maps[0].shape[1], bins, bins)


@_region_align_backward.register_fake
def _(gradient, grids, sizes, sampling_ratio):
    images, channels = gradient.shape[0], gradient.shape[2]
    shapes = [(images, *sizes[i : i + 2], channels) for i in range(0, len(sizes), 2)]
    return [gradient.new_empty(shape).permute(0, 3, 1, 2) for shape in shapes]


@_crop_masks.register_fake
def _(masks, width, grids, side):
    return grids.new_empty(len(grids), side, side, dtype=torch.float32)


def _save_grids(ctx, inputs, output):
    maps, grids, _, ctx.sampling_ratio = inputs
    ctx.sizes = [size for x in maps for size in x.shape[2:]]
    ctx.save_for_backward(grids)


def _gradients(ctx, gradient):
    (grids,) = ctx.saved_tensors
    return _region_align_backward(gradient, grids, ctx.sizes, ctx.sampling_ratio), None, None, None


_region_align.register_autograd(_gradients, setup_context=_save_grids)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _each_image(work: Callable[[int], None], images: int) -> None:
    """Call `work` for each image, in as many threads as torch has; the compiled loops run without the GIL."""
    threads = min(images, torch.get_num_threads())
    if threads <= 1:
        for image in range(images):
            work(image)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(images)))


def _weigh_lines(axis: Tensor, size: int, bins: int, sampling_ratio: int) -> Tensor:
    """Return the weights (..., bins, size) of a map's lines in the bins of an axis (..., 3: start, bin, samples)."""
    start, step, samples = (t[..., None, None] for t in axis.unbind(-1))
    line = torch.arange(size, device=axis.device, dtype=axis.dtype)
    apart = step / samples.clamp(min=1)
    start = start + torch.arange(bins, device=axis.device, dtype=axis.dtype)[:, None] * step + apart / 2
    near = torch.zeros_like(start + line) if sampling_ratio else ((line - 1 - start) / apart).ceil().clamp(min=0)
    weights = torch.zeros_like(near)
    for i in range(sampling_ratio or NEIGHBOURS):
        sample = near + i
        place = start + sample * apart
        counts = (sample >= 0) & (sample < samples) & (place >= -1) & (place <= size)
        weight = (1 - (line - place.clamp(0, size - 1)).abs()).clamp(min=0) / samples
        weights = weights + torch.where(counts, weight, 0)
    return weights


def _chunks(grids: Tensor, shapes: Sequence[Sequence[int]], bins: int, sampling_ratio: int):
    """Yield the image, a slice of its regions, the level, and the weights of its rows and columns."""
    for image in range(len(grids)):
        for begin in range(0, grids.shape[1], CHUNK):
            part = slice(begin, begin + CHUNK)
            grid = grids[image, part]
            for level, (_, height, width, _) in enumerate(shapes):
                rows = _weigh_lines(grid[:, 1:4], height, bins, sampling_ratio) * (grid[:, :1, None] == level)
                yield image, part, level, rows, _weigh_lines(grid[:, 4:], width, bins, sampling_ratio)


def _pool_plainly(features: Sequence[Tensor], grids: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """Pool features (N, H, W, C) by matrices; work and memory grow with the maps."""
    pooled = features[0].new_zeros(*grids.shape[:2], features[0].shape[-1], bins, bins)
    grids = grids.to(pooled.dtype)
    with torch.autocast(grids.device.type, enabled=False):  # it stays active inside custom operators
        for image, part, level, rows, columns in _chunks(grids, [x.shape for x in features], bins, sampling_ratio):
            lines = torch.einsum("rih,hwc->riwc", rows, features[level][image])
            pooled[image, part] += torch.einsum("riwc,rjw->rcij", lines, columns)
    return pooled


def _spread_plainly(
    gradient: Tensor, grids: Tensor, shapes: Sequence[tuple[int, ...]], sampling_ratio: int
) -> list[Tensor]:
    """Return the gradients (N, H, W, C) of the features, given that of the pooled regions (N, R, bins, bins, C)."""
    features = [gradient.new_zeros(shape) for shape in shapes]
    grids = grids.to(gradient.dtype)
    with torch.autocast(grids.device.type, enabled=False):
        for image, part, level, rows, columns in _chunks(grids, shapes, gradient.shape[2], sampling_ratio):
            lines = torch.einsum("rijc,rjw->riwc", gradient[image, part], columns)
            features[level][image] += torch.einsum("riwc,rih->hwc", lines, rows)
    return features


def _pool_bits_plainly(masks: Tensor, width: int, grids: Tensor, side: int) -> Tensor:
    """Pool the bits of masks by matrices. Of CHUNK masks every eighth column is unpacked at once, as whole masks would
    take gigabytes of a large canvas."""
    pooled = grids.new_empty(len(grids), side, side)
    with torch.autocast(grids.device.type, enabled=False):
        for begin in range(0, len(grids), CHUNK):
            grid = grids[begin : begin + CHUNK]
            own = masks[grid[:, 0].long()]
            rows = _weigh_lines(grid[:, 1:4], masks.shape[1], side, 0)
            columns = _weigh_lines(grid[:, 4:], width, side, 0)
            lines = torch.stack([rows @ (own >> shift & 1).to(rows.dtype) for shift in range(7, -1, -1)], -1)
            pooled[begin : begin + CHUNK] = lines.flatten(2)[..., :width] @ columns.transpose(1, 2)
    return pooled
