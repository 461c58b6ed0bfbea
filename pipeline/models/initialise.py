"""Initial weights as a function of (seed, tensor name): the same on any rank, engine or world size."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, seed: int, names: Iterable[str] | None = None) -> None:
    """Set the named parameters of `model` (all by default) in place.

    Weights of convolutions and linear layers, and the mask token, are normal with standard deviation 0.02; norms are 1
    and 0; biases, gamma and beta are 0. The official pre-training code re-draws most weights with standard deviation 1,
    which gives a first loss near 16 and NaN in half precision (issue 64 of its repository); that is not repeated here.
    `model.init_scales`, if there is one, maps a name to a factor.
    """
    wanted = set(names) if names is not None else None
    scales = getattr(model, "init_scales", {})
    for name, parameter in model.named_parameters():
        if wanted is None or name in wanted:
            parameter.copy_(initial_value(name, parameter.shape, seed) * scales.get(name, 1.0))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The initial fp32 value of one parameter."""
    if name == "mask_token" or (name.endswith(".weight") and len(shape) > 1):
        digest = hashlib.sha256(f"{seed}\x1f{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, STD, generator=generator)
    return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
