"""Import timm, even beside a torchvision that was built for another torch."""

import importlib
from types import ModuleType

import torch

from pipeline.errors import UserError


def import_timm() -> ModuleType:
    """Import timm.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import_torchvision()
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"timm cannot be imported ({error}); run: pip install timm") from error


def import_torchvision() -> None:
    """Import torchvision if it is installed, because timm does.

    A build for another torch lacks its own operators. No operator is used here, so empty ones are defined instead.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        global _operators  # the definitions last as long as this object
        _operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
