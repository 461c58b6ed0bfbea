"""What all model families share: a classifier that can be an encoder alone, drop path, activation checkpointing."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.batchnorm import counts_batches
from pipeline.models.initialise import initialise


class Backbone(nn.Module):
    """A classifier of images in stages of blocks; an encoder without final norm and head if `num_classes` is 0.

    A subclass makes its layers between `super().__init__` and `finish`.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        num_classes: outputs of the head, or 0.
        in_channels: channels of the images.
        stem_stride: pixels on a side of one site after the stem.
        checkpointing: compute the activations inside a block again in the backward pass instead of keeping them.
    """

    head_prefix: str
    """Prefix of the names of the head's parameters."""

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int,
        in_channels: int,
        stem_stride: int,
        checkpointing: bool,
    ):
        super().__init__()
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.num_classes, self.in_channels, self.stem_stride = num_classes, in_channels, stem_stride
        self.checkpointing = checkpointing
        self.map_channels = self.dims
        """Channels of each map of `forward_features`."""

    def finish(self, head_init_scale: float, seed: int) -> None:
        """Set the initial weights, those of the head times `head_init_scale`."""
        head = [name for name, _ in self.named_parameters() if name.startswith(self.head_prefix)]
        self.init_scales = dict.fromkeys(head, head_init_scale)
        self.counts_batches = counts_batches(self)
        initialise(self, seed)

    @property
    def stride(self) -> int:
        """Pixels on a side of one site of the last map; with masks, of one cell."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    def first_stages(self, count: int) -> list[nn.Module]:
        """The modules of the stem and the first `count` stages, downsampling included; none if `count` is 0."""
        raise NotImplementedError

    def drop_path_rates(self, rate: float, frozen_stages: int = 0) -> list[float]:
        """The drop-path rate of each row of `keep`: 0 at the first block, rising evenly to `rate` at the last.

        frozen_stages: number of the first stages, which drop no path.
        """
        blocks, frozen = sum(self.depths), sum(self.depths[:frozen_stages])
        return [rate * i / max(blocks - 1, 1) if i >= frozen else 0.0 for i in range(blocks)]


def check_choices(**options: tuple[Any, Collection[str]]) -> None:
    """Check options, each given as its value and the values that it may have.

    Raises:
        ValueError: if a value is unknown.
    """
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")


def drop_path(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Scale a residual branch (N, ...) by `keep` (N,): 0 for an image that drops it, else 1 / keep probability.

    The caller draws `keep`, because a generator inside a block would draw anew under activation checkpointing.
    """
    return branch if keep is None else branch * keep.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Tensor:
    """Call the block; if `checkpointing`, keep nothing but its inputs for the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        # No block draws random numbers, and saving a GPU's generator state would wait for the GPU.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
