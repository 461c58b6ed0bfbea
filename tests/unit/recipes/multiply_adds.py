"""The multiply-adds of a recipe's model, about as mmcv counts them for the published tables."""

import torch
from torch import Tensor, nn

from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe


def meta_model(recipe: StageRecipe) -> nn.Module:
    """The model of a stage, without values."""
    with torch.device("meta"):
        return create_objective(recipe, seed=0).build_model().eval()


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of the convolutions, linear layers and ReLUs of a model that gets these inputs."""
    macs = 0

    def count(module, _, out):
        nonlocal macs
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += out.numel() // module.weight.shape[0] * module.weight.numel()
        elif isinstance(module, nn.ConvTranspose2d):  # its step is the kernel's size, so a site is made of one site
            macs += out.numel() * module.weight.shape[0]
        elif isinstance(module, nn.ReLU):
            macs += out.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(*inputs)
    return macs
