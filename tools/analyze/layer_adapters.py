"""Where the analyses look inside a network: one small adapter per family, for our models and timm's.

An adapter knows the blocks of each stage, the layer of a block that reads its MLP channels, and the memory layout of a
block's output. Adapters are found by the name of the model's class, so that no package of models is imported here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from pipeline.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """How to look into the models of one family."""

    stages: Callable[[Any], list[list[nn.Module]]]
    """The blocks of each stage of a model."""
    reader: tuple[str, ...]
    """The name in a block of the layer that reads its widest channels; of several names the first that exists."""
    to_map: Callable[[Any, Tensor], Tensor]
    """Turns a block's output into (N, C, h, w)."""


@dataclass(frozen=True)
class Layer:
    """A block of a model, with its name, its stage, and its depth from 0 (the first block) to 1 (the last)."""

    name: str
    stage: int
    depth: float
    block: nn.Module
    reader: nn.Module | None


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter for a model.

    Raises:
        UserError: if there is none for its class.
    """
    kind = type(model)
    known = TIMM if kind.__module__.partition(".")[0] == "timm" else OURS
    if kind.__name__ not in known:
        names = ", ".join([*OURS, *(f"timm's {name}" for name in TIMM)])
        raise UserError(f"there is no adapter for models of class {kind.__name__}; choose a model of {names}")
    return known[kind.__name__]


def layers_of(model: nn.Module) -> list[Layer]:
    """All blocks of a model, first to last."""
    adapter = adapter_of(model)
    names = {module: name for name, module in model.named_modules()}
    blocks = [(stage, block) for stage, blocks in enumerate(adapter.stages(model)) for block in blocks]
    last = max(len(blocks) - 1, 1)
    layers = []
    for place, (stage, block) in enumerate(blocks):
        inside = dict(block.named_modules())
        reader = next((inside[name] for name in adapter.reader if name in inside), None)
        layers.append(Layer(names[block], stage, place / last, block, reader))
    return layers


def stage_ends(model: nn.Module) -> list[Layer]:
    """The last block of each stage, whose output is the stage's map."""
    return list({layer.stage: layer for layer in layers_of(model)}.values())


@contextmanager
def watching(
    layers: dict[Any, nn.Module], look: Callable[[Any, Tensor], None], *, inputs: bool = False
) -> Iterator[None]:
    """Inside the block, call `look(key, tensor)` with the output of each module, or with its input for `inputs`."""

    def hook(key: Any) -> Callable[..., None]:
        return lambda module, given, output: look(key, given[0] if inputs else output)

    handles = [module.register_forward_hook(hook(key)) for key, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_to_last_map(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a model, and the output of its last block, before `to_map`."""
    outputs: list[Tensor] = []
    with watching({0: layers_of(model)[-1].block}, lambda _, x: outputs.append(x)):
        result = model(pixels)
    return result, outputs[-1]


def by_channel(model: nn.Module, reader: nn.Module, x: Tensor) -> Tensor:
    """The input of a model's linear layer or convolution as (N, C, sites), without class tokens."""
    if isinstance(reader, nn.Conv2d):
        return x.flatten(2)
    return x.flatten(1, -2)[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)


def _channels_first(model: nn.Module, x: Tensor) -> Tensor:
    return x


def _channels_last(model: nn.Module, x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _tokens(model: Any, x: Tensor) -> Tensor:
    patches = x[:, model.num_prefix_tokens :]
    return patches.transpose(1, 2).unflatten(2, tuple(model.patch_embed.grid_size))


def _stages(model: Any) -> list[list[nn.Module]]:
    return [list(stage) for stage in model.stages]


def _timm_stages(model: Any) -> list[list[nn.Module]]:
    return [list(stage.blocks) for stage in model.stages]


def _nextvit_stages(model: Any) -> list[list[nn.Module]]:
    blocks = iter(model.features)
    return [list(islice(blocks, depth)) for depth in model.depths]


OURS = {
    "ConvNeXtV2": Adapter(_stages, ("pwconv2",), _channels_last),
    "SLaK": Adapter(_stages, ("pwconv2",), _channels_last),
    "NextViT": Adapter(_nextvit_stages, ("mlp.conv2", "pwconv2", "conv3"), _channels_first),
}
TIMM = {
    "ConvNeXt": Adapter(_timm_stages, ("mlp.fc2",), _channels_first),
    "EfficientNet": Adapter(lambda model: [list(stage) for stage in model.blocks], ("conv_pwl",), _channels_first),
    "NextViT": Adapter(_timm_stages, ("mlp.fc2",), _channels_first),
    "ResNet": Adapter(
        lambda model: [list(getattr(model, f"layer{number}")) for number in range(1, 5)],
        ("conv3", "conv2"),  # a bottleneck's, a basic block's
        _channels_first,
    ),
    "SwinTransformer": Adapter(
        lambda model: [list(stage.blocks) for stage in model.layers], ("mlp.fc2",), _channels_last
    ),
    "VisionTransformer": Adapter(lambda model: [list(model.blocks)], ("mlp.fc2",), _tokens),
}
