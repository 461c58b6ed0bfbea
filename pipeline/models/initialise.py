"""Initial weights as a function of (seed, tensor name): the same on any rank, engine or world size.

A model's `init` names one of two schemes:

plain: convolutions, linear layers and mask tokens are normal with standard deviation 0.02; norms are 1 and 0; biases,
    gamma and beta are 0. The official classifier does the same (its truncation at 2.0 cuts nothing).
official: the scheme of the official pre-training code (models/fcmae.py), for comparisons. That code initialises the
    encoder as above and then draws most of it again with trunc_normal's default standard deviation, 1: the stem, every
    depthwise and pointwise layer of the encoder, the decoder's depthwise convolution, `proj` and `pred`. The 2x2
    convolutions stay at 0.02. The decoder's linear layers are never touched and keep torch's default, biases included.
    Atto's predictions then start near 1e5 and its loss near 16 instead of 1, which overflows half precision; users
    have traced NaNs to it. Outside FCMAE, and for tensors that the official code does not have, it equals plain.
"""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SCHEMES = ("plain", "official")
STD = 0.02

_DEVIATION_1 = re.compile(
    r"encoder\.downsample_layers\.0\.0\.weight|encoder\.stages\.\d+\.\d+\.(dwconv|pwconv1|pwconv2)\.weight"
    r"|decoder\.\d+\.dwconv\.weight|proj\.weight|pred\.weight"
)
_TORCH_DEFAULT = re.compile(r"(decoder\.\d+\.pwconv[12])\.(weight|bias)")


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Set all parameters and buffers of the model in place, and `model.seed`.

    On the meta device only `model.seed` is set: call this again when the tensors have memory (after `to_empty`). They
    are then equal to those of a model that was built with memory.
    """
    model.seed = seed
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    for name, value in initial_values(model, seed):
        tensors[name].copy_(value)


def initial_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and initial value (fp32, on the CPU) of each parameter and buffer; the model may be on meta.

    A module's `initial_constants` (name of its own tensor to value) replace the scheme, and the model's `init_scales`
    (full name to factor) are multiplied with the result.
    """
    scales, official = getattr(model, "init_scales", {}), getattr(model, "init", "plain") == "official"
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    for path, module in model.named_modules():
        constants = getattr(module, "initial_constants", {})
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for short, tensor in own:
            name = f"{path}.{short}" if path else short
            if short in constants:
                value = torch.full(tensor.shape, constants[short], device="cpu", dtype=torch.float32)
            elif official and (_DEVIATION_1.fullmatch(name) or _TORCH_DEFAULT.fullmatch(name)):
                value = _official(name, shapes, seed)
            else:
                value = _plain(name, tensor.shape, seed)
            yield name, value * scales.get(name, 1.0)


def _plain(name: str, shape: torch.Size, seed: int) -> Tensor:
    if "mask_token" in name or (name.endswith(".weight") and len(shape) > 1):
        return _empty(shape).normal_(0.0, STD, generator=_generator(name, seed))
    return _empty(shape).fill_(1.0 if name.endswith((".weight", ".running_var")) else 0.0)


def _official(name: str, shapes: dict[str, torch.Size], seed: int) -> Tensor:
    generator = _generator(name, seed)
    if _DEVIATION_1.fullmatch(name):
        return nn.init.trunc_normal_(_empty(shapes[name]), std=1.0, a=-2.0, b=2.0, generator=generator)
    fan_in = shapes[name.rpartition(".")[0] + ".weight"][1]
    return _empty(shapes[name]).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)


def _empty(shape: torch.Size) -> Tensor:
    # The device is named because the caller may be inside `with torch.device("meta")`.
    return torch.empty(shape, device="cpu", dtype=torch.float32)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\x1f{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
