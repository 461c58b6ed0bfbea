"""Where in a network the analyses look: one small adapter per family, for our models and for timm's.

An adapter knows the blocks of each stage, which layer of a block reads its MLP channels, and how features lie in what a
block gives. Adapters go by the name of the class, so that none of these packages is imported here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from pipeline.errors import UserError

Map = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """`stages` gives the blocks of each stage; `reader` names, in a block, the layer that reads its widest channels
    (several names: the first that exists); `to_map` turns what a block gives into (N, C, h, w)."""

    stages: Callable[[Any], list[list[nn.Module]]]
    reader: tuple[str, ...]
    to_map: Map


@dataclass(frozen=True)
class Layer:
    """A block by its name in the model: in which stage it is, and how deep, from 0 (the first) to 1 (the last)."""

    name: str
    stage: int
    depth: float
    block: nn.Module
    reader: nn.Module | None


def family_of(model: nn.Module) -> Family:
    """Raises UserError for a network of a family without an adapter."""
    kind = type(model)
    known = TIMM if kind.__module__.partition(".")[0] == "timm" else OURS
    if kind.__name__ not in known:
        names = ", ".join([*OURS, *(f"timm's {name}" for name in TIMM)])
        raise UserError(f"there is no adapter for models of class {kind.__name__}; the analyses know {names}")
    return known[kind.__name__]


def layers_of(model: nn.Module) -> list[Layer]:
    """All blocks of a model, first to last."""
    family = family_of(model)
    names = {module: name for name, module in model.named_modules()}
    blocks = [(stage, block) for stage, blocks in enumerate(family.stages(model)) for block in blocks]
    last = max(len(blocks) - 1, 1)
    return [
        Layer(names[block], stage, place / last, block, _reader(block, family.reader))
        for place, (stage, block) in enumerate(blocks)
    ]


def stage_ends(model: nn.Module) -> list[Layer]:
    """The last block of each stage: what it gives is the stage's map."""
    layers = layers_of(model)
    return [
        here for here, after in zip(layers, [*layers[1:], None], strict=True) if not after or after.stage > here.stage
    ]


@contextmanager
def watching(
    layers: dict[Any, nn.Module], look: Callable[[Any, Tensor], None], *, inputs: bool = False
) -> Iterator[None]:
    """Within the block, `look(key, tensor)` is shown what each module gives, or with `inputs` what it is given."""

    def hook(key: Any) -> Callable[..., None]:
        def show(module: nn.Module, given: tuple, output: Tensor) -> None:
            look(key, given[0] if inputs else output)

        return show

    handles = [module.register_forward_hook(hook(key)) for key, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_channel(reader: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer or convolution reads, as (N, C, sites)."""
    if isinstance(reader, nn.Conv2d):
        return x.flatten(2)
    return x.flatten(1, -2).transpose(1, 2)


def _reader(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    modules = dict(block.named_modules())
    return next((modules[name] for name in names if name in modules), None)


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
    "ConvNeXtV2": Family(_stages, ("pwconv2",), _channels_last),
    "SLaK": Family(_stages, ("pwconv2",), _channels_last),
    "NextViT": Family(_nextvit_stages, ("mlp.conv2",), _channels_first),
}
TIMM = {
    "ConvNeXt": Family(_timm_stages, ("mlp.fc2",), _channels_first),
    "EfficientNet": Family(lambda model: [list(stage) for stage in model.blocks], ("conv_pwl",), _channels_first),
    "NextViT": Family(_timm_stages, ("mlp.fc2",), _channels_first),
    "ResNet": Family(
        lambda model: [list(getattr(model, f"layer{number}")) for number in range(1, 5)],
        ("conv3", "conv2"),  # a bottleneck's, a basic block's
        _channels_first,
    ),
    "SwinTransformer": Family(
        lambda model: [list(stage.blocks) for stage in model.layers], ("mlp.fc2",), _channels_last
    ),
    "VisionTransformer": Family(lambda model: [list(model.blocks)], ("mlp.fc2",), _tokens),
}
