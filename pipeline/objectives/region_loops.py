"""Compile the loops over regions and boxes before any time-out runs."""

from functools import cache
from pathlib import Path

import numpy as np

from pipeline.data.compiled_code import compiling
from pipeline.kernels import numba_regions


@cache
def compile_regions(double: bool = False) -> None:
    """Compile the loops of a detector on the CPU, or load them from disk.

    One process of this machine compiles while the others wait for it.

    double: for fp64 instead of fp32, in which lower precisions are computed too.
    """
    dtype = np.float64 if double else np.float32
    grids, features = np.zeros((1, 7), dtype), np.zeros((1, 1, 1), dtype)
    pooled = np.zeros((1, 1, 1, 1), dtype)
    folder = Path(numba_regions.pool_regions.stats.cache_path)
    with compiling(folder, f"regions-{np.dtype(dtype)}", Path(numba_regions.__file__).parent):
        numba_regions.pool_regions(features, grids, 0, pooled)
        numba_regions.spread_regions(pooled, grids, 0, features)
        numba_regions.pool_bits(np.zeros((1, 1, 1), np.uint8), 1, grids, pooled[0])
        numba_regions.keep_boxes(np.zeros((4, 1), dtype), dtype(0.5), np.ones(1, np.bool_))
