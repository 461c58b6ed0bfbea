"""Other implementations of the model, to compare with; they are in the extras `test` (timm) and `oracles`."""

import importlib
import os
from types import ModuleType

import pytest
import torch

from tools.analyze.timm_import import import_torchvision


def oracle(name: str, *, always_in_ci: bool) -> ModuleType:
    """The package, or a skipped test where it is not installed; in CI that is an error for what the test extra has."""
    try:
        import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        if always_in_ci and os.environ.get("CI"):
            raise
        pytest.skip(f"{name} is not installed ({error})")


def randomise(tensors: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 weights under our names, of the sizes that training gives; GRN is not zero."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if ".grn." in name:
            result[name] = 0.5 * noise
        elif name.endswith(".weight") and noise.ndim > 1:
            result[name] = noise / tensor[0].numel() ** 0.5
        else:
            result[name] = 0.1 * noise + name.endswith(".weight")
    return result
