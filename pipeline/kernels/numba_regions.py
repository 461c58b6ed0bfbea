"""Compiled loops over regions and boxes for the CPU; `region_align.py` and `suppression.py` call them.

Each call works on one image, in the order of its regions, so bits depend neither on threads nor on other images.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def _compiled(function: Callable) -> Any:
    return numba.njit(function, cache=True, nogil=True)


@_compiled
def weigh_axis(start, step, count, size, weights, bounds):
    """Write the weights of the `size` lines of a map in each bin of an axis into weights (bins, size), and into
    bounds (bins, 2) the first line with a weight and the line behind the last one.

    The first bin begins at `start`; each is `step` lines long and has `count` samples. A sample interpolates two lines.
    Up to one line outside of the map it takes the line at the border, further outside 0.
    """
    for b in range(len(weights)):
        weights[b] = 0
        first, last = size, 0
        for s in range(count):
            place = start + b * step + (s + 0.5) * (step / count)
            if place < -1 or place > size:
                continue
            place = max(place, 0.0)
            low = min(int(place), size - 1)
            high = min(low + 1, size - 1)
            part = place - low if high > low else 0.0
            weights[b, low] += (1 - part) / count
            weights[b, high] += part / count
            first, last = min(first, low), max(last, high + 1)
        bounds[b, 0], bounds[b, 1] = first, last


@_compiled
def pool_regions(features, grids, level, pooled):
    """Fill pooled (R, C, bins, bins) for the regions of grids (R, 7) on one level from its features (H, W, C)."""
    height, width, channels = features.shape
    bins = pooled.shape[2]
    rows, columns = np.empty((bins, height)), np.empty((bins, width))
    row_bounds, column_bounds = np.empty((bins, 2), np.int64), np.empty((bins, 2), np.int64)
    line, total = np.empty((width, channels), features.dtype), np.empty(channels, features.dtype)
    for r in range(len(grids)):
        if grids[r, 0] != level:
            continue
        weigh_axis(grids[r, 1], grids[r, 2], int(grids[r, 3]), height, rows, row_bounds)
        weigh_axis(grids[r, 4], grids[r, 5], int(grids[r, 6]), width, columns, column_bounds)
        left, right = column_bounds[:, 0].min(), column_bounds[:, 1].max()
        for i in range(bins):
            line[left:right] = 0
            for y in range(row_bounds[i, 0], row_bounds[i, 1]):
                weight = features.dtype.type(rows[i, y])
                for x in range(left, right):
                    for c in range(channels):
                        line[x, c] += weight * features[y, x, c]
            for j in range(bins):
                total[:] = 0
                for x in range(column_bounds[j, 0], column_bounds[j, 1]):
                    weight = features.dtype.type(columns[j, x])
                    for c in range(channels):
                        total[c] += weight * line[x, c]
                for c in range(channels):
                    pooled[r, c, i, j] = total[c]


@_compiled
def spread_regions(gradient, grids, level, features):
    """Add the gradient (R, bins, bins, C) of pooled regions to that of the features (H, W, C) of their level."""
    height, width, channels = features.shape
    bins = gradient.shape[1]
    rows, columns = np.empty((bins, height)), np.empty((bins, width))
    row_bounds, column_bounds = np.empty((bins, 2), np.int64), np.empty((bins, 2), np.int64)
    line = np.empty((width, channels), features.dtype)
    for r in range(len(grids)):
        if grids[r, 0] != level:
            continue
        weigh_axis(grids[r, 1], grids[r, 2], int(grids[r, 3]), height, rows, row_bounds)
        weigh_axis(grids[r, 4], grids[r, 5], int(grids[r, 6]), width, columns, column_bounds)
        left, right = column_bounds[:, 0].min(), column_bounds[:, 1].max()
        for i in range(bins):
            line[left:right] = 0
            for j in range(bins):
                for x in range(column_bounds[j, 0], column_bounds[j, 1]):
                    weight = features.dtype.type(columns[j, x])
                    for c in range(channels):
                        line[x, c] += weight * gradient[r, i, j, c]
            for y in range(row_bounds[i, 0], row_bounds[i, 1]):
                weight = features.dtype.type(rows[i, y])
                for x in range(left, right):
                    for c in range(channels):
                        features[y, x, c] += weight * line[x, c]


@_compiled
def pool_bits(masks, width, grids, pooled):
    """Fill pooled (R, bins, bins) from masks (T, H, bytes) of `width` bits a row; grids (R, 7) begin with the mask."""
    height, bins = masks.shape[1], pooled.shape[1]
    rows, columns = np.empty((bins, height)), np.empty((bins, width))
    row_bounds, column_bounds = np.empty((bins, 2), np.int64), np.empty((bins, 2), np.int64)
    line = np.empty(width)
    for r in range(len(grids)):
        mask = masks[int(grids[r, 0])]
        weigh_axis(grids[r, 1], grids[r, 2], int(grids[r, 3]), height, rows, row_bounds)
        weigh_axis(grids[r, 4], grids[r, 5], int(grids[r, 6]), width, columns, column_bounds)
        left, right = column_bounds[:, 0].min(), column_bounds[:, 1].max()
        for i in range(bins):
            line[left:right] = 0
            for y in range(row_bounds[i, 0], row_bounds[i, 1]):
                for x in range(left, right):
                    if mask[y, x >> 3] >> (7 - (x & 7)) & 1:
                        line[x] += rows[i, y]
            for j in range(bins):
                total = 0.0
                for x in range(column_bounds[j, 0], column_bounds[j, 1]):
                    total += columns[j, x] * line[x]
                pooled[r, i, j] = total


@_compiled
def keep_boxes(corners, threshold, keep):
    """Clear keep (K,) for each box of corners (4, K) that a kept box before it overlaps by more than the threshold.

    The overlap is the intersection over the union, in the type of the corners.
    """
    x1, y1, x2, y2 = corners
    areas = (x2 - x1) * (y2 - y1)
    for i in range(len(keep)):
        if not keep[i]:
            continue
        for j in range(i + 1, len(keep)):
            width = min(x2[i], x2[j]) - max(x1[i], x1[j])
            height = min(y2[i], y2[j]) - max(y1[i], y1[j])
            if width > 0 and height > 0:
                both = width * height
                if both / (areas[i] + areas[j] - both) > threshold:
                    keep[j] = False
