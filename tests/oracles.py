"""Other implementations of the model, to compare with; they are in the extras `test` (timm) and `oracles`."""

import importlib
import os
from collections.abc import Mapping
from types import ModuleType

import pytest
import torch

from pipeline.weights.architecture import Architecture
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
    """float64 weights under our names, of the sizes that training gives; neither GRN nor LayerScale is near zero."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if ".grn." in name or name.endswith(".gamma"):  # LayerScale's gamma is 1e-6 before training
            result[name] = 0.5 * noise
        elif name.endswith(".weight") and noise.ndim > 1:
            result[name] = noise / tensor[0].numel() ** 0.5
        else:
            result[name] = 0.1 * noise + name.endswith(".weight")
    return result


def random_weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    """float64 weights of a model of this architecture, as `randomise` makes them."""
    return randomise({name: torch.empty(shape, device="meta") for name, shape in architecture.shapes().items()})


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names in the same order, and equal bits."""
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def different_images(count: int, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(count, 3, size, size) noise, of another colour and contrast each: of noise alone features have one mean."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    contrast = torch.linspace(0.3, 1.5, count, dtype=torch.float64).view(-1, 1, 1, 1)
    return (images * contrast + torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)).to(dtype)


@torch.no_grad()
def as_if_trained(model: torch.nn.Module, images: torch.Tensor, seed: int = 0) -> torch.nn.Module:
    """The model in evaluation, weights randomised, BatchNorms with the statistics of `images`: so its outputs are of
    order 1, and differ by the image. With other statistics they vanish or explode on their way through many blocks."""
    model.load_state_dict(randomise(dict(model.named_parameters()), seed), strict=False)
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def assert_equal_outputs(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Up to `tolerance` of how far outputs differ between images, or of 1: what hardly depends on the images, as the
    1e-6 of an untrained Next-ViT, would equal anything."""
    spread = expected.std(0).mean().item()
    assert spread > 0.1, spread
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= tolerance * min(1.0, spread)
