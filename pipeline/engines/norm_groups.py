"""Let the BatchNorms of a segmenter or detector take their statistics over a norm group, which may span ranks.

`share_norm_groups` is for training; `play_norm_groups` is for a single process that stands for one of many ranks.
"""

import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeProcessGroup

from pipeline.distributed.world import World
from pipeline.models.batchnorm import set_norm_group
from pipeline.recipe import StageRecipe
from pipeline.recipe.segmentation_settings import NormGroup


def share_norm_groups(model: nn.Module, group: NormGroup | None, world: World) -> None:
    """Set the norm group of every BatchNorm; without a group, they count the images of a forward. Collective."""
    if group is not None:
        set_norm_group(model, group.images, _neighbours(group.ranks, world))


def play_norm_groups(model: nn.Module, recipe: StageRecipe, ranks: int, images: int) -> None:
    """Set the norm group of every BatchNorm as an engine on `ranks` ranks would, without any communication.

    Where a rank's share of a group has more images than a forward, or no number of ranks has such micro-batches, the
    images of a forward count, as in a measurement. A single image counts with others, because the pooled map of one has
    no variance.

    Args:
        images: of a forward.
    """
    if recipe.norm_group_images is None:
        return
    group = recipe.norm_group_on(ranks) or NormGroup(1, images)
    own = min(group.images, images)
    sharing = 2 if own == group.ranks == 1 else group.ranks
    set_norm_group(model, own, FakeProcessGroup._create_internal(0, sharing) if sharing > 1 else None)


def _neighbours(count: int, world: World) -> dist.ProcessGroup | None:
    """The process group of the `count` ranks that share a norm group with this one; None if it has its own."""
    if count == 1:
        return None
    if count == world.size:
        return dist.group.WORLD  # no second communicator
    # As with torch's SyncBatchNorm on a group of ranks, their sums run beside DDP's all-reduces on communicators of
    # their own. NCCL asks then that all ranks issue collectives in one order: one thread issues both here, along the
    # same graph on every rank.
    groups = [dist.new_group(list(range(first, first + count))) for first in range(0, world.size, count)]
    return groups[world.rank // count]
