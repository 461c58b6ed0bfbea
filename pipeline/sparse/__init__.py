"""Where features lie in memory. `models` compute; the layouts here decide over which sites.

In every layout a feature tensor is (N, sites..., C): images first, channels last, so that LayerNorm, Linear and GELU
need no layout at all. Only the stem, the downsampling, the depthwise convolution and GRN ask the layout.
"""

from collections.abc import Callable

from pipeline.sparse.geometry import VisibleCells
from pipeline.sparse.layouts import DENSE, Dense, Layout, Leaking, Masked, Packed

__all__ = ["DENSE", "LAYOUTS", "Dense", "Layout", "Leaking", "Masked", "Packed", "VisibleCells", "find_layout"]

LAYOUTS = ("packed", "masked", "spconv", "dense")


def find_layout(name: str) -> Callable[[VisibleCells], Layout]:
    """The layout of an encoder that is shown some cells, by name: it is to be called with them.

    Raises:
        ValueError: if there is none of this name, or the package it needs is not installed.
    """
    if name not in LAYOUTS:
        raise ValueError(f"encoder_backend is {name!r}; choose one of {', '.join(LAYOUTS)}")
    if name == "spconv":
        try:
            from pipeline.sparse.spconv_layout import Spconv
        except ImportError as error:
            raise ValueError(
                f"encoder_backend spconv needs the package of that name ({error}); run `pip install 'fcmae[spconv]'`, "
                "or choose packed, which computes the same"
            ) from error
        return Spconv
    return {"packed": Packed, "masked": Masked, "dense": Leaking}[name]
