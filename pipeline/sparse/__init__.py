"""How features lie in memory while only some cells of an image are visible.

In every layout a feature tensor is (N, sites..., C): images first, channels last, so that LayerNorm, Linear and GELU
need no layout. Only the stem, the downsampling, the depthwise convolution and response normalisation ask the layout.
"""

from collections.abc import Callable

from pipeline.sparse.geometry import VisibleCells
from pipeline.sparse.layouts import DENSE, Dense, Layout, Leaking, Masked, Packed

LAYOUTS = ("packed", "masked", "spconv", "dense")


def find_layout(name: str) -> Callable[[VisibleCells], Layout]:
    """Return the layout of an `encoder_backend`: call it with the visible cells of a batch.

    Raises:
        ValueError: if the name is unknown, or the package that it needs is not installed.
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


__all__ = ["DENSE", "LAYOUTS", "Dense", "Layout", "Leaking", "Masked", "Packed", "VisibleCells", "find_layout"]
