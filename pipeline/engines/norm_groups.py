"""Let the BatchNorms of a segmentation model take their statistics over a norm group, which may span ranks."""

import torch.distributed as dist
from torch import nn

from pipeline.distributed.world import World
from pipeline.models.batchnorm import set_norm_group
from pipeline.recipe.segmentation_settings import NormGroup


def share_norm_groups(model: nn.Module, group: NormGroup | None, world: World) -> None:
    """Set the norm group of every BatchNorm; without a group, they count the images of a forward. Collective."""
    if group is not None:
        set_norm_group(model, group.images, _neighbours(group.ranks, world))


def _neighbours(count: int, world: World) -> dist.ProcessGroup | None:
    """The process group of the `count` ranks that share a norm group with this one; None if it has its own."""
    if count == 1:
        return None
    if count == world.size:
        return dist.group.WORLD  # the gradients' group, because two groups of NCCL could run in two orders
    groups = [dist.new_group(list(range(first, first + count))) for first in range(0, world.size, count)]
    return groups[world.rank // count]
