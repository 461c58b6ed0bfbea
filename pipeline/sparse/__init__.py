"""Where features lie in memory. `models` compute; the layouts here decide over which sites.

In every layout a feature tensor is (N, sites..., C): images first, channels last, so that LayerNorm, Linear and GELU
need no layout at all. Only the stem, the downsampling, the depthwise convolution and GRN ask the layout.
"""

from pipeline.sparse.geometry import VisibleCells
from pipeline.sparse.layouts import DENSE, LAYOUTS, Dense, Layout, Leaking, Masked, Packed, find_layout

__all__ = ["DENSE", "LAYOUTS", "Dense", "Layout", "Leaking", "Masked", "Packed", "VisibleCells", "find_layout"]
