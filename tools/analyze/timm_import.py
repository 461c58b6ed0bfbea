"""timm, beside a torchvision that may be of another build than torch."""

import importlib
from types import ModuleType

import torch

from pipeline.errors import UserError


def import_timm() -> ModuleType:
    """Raises UserError without timm."""
    try:
        import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"models of timm need that package ({error}); run: pip install timm") from error


def import_torchvision() -> None:
    """timm imports it where it is; a build for another torch misses its own operators, none of which is used here."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        global _operators  # the definitions live as long as this object
        _operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
