"""Let the BatchNorms of a model on the meta device share statistics with ranks that are not there."""

from torch import nn
from torch._C._distributed_c10d import FakeProcessGroup

from pipeline.models.batchnorm import set_norm_group
from pipeline.recipe import StageRecipe


def play_norm_groups(model: nn.Module, recipe: StageRecipe, ranks: int) -> None:
    """Set the norm group of every BatchNorm as an engine on so many ranks would; its collectives reach nobody.

    Where no number of ranks has such micro-batches, the images of a forward count, as in a measurement; a single image
    counts with others, because the pooled map of one has no variance.
    """
    group = recipe.norm_group_on(ranks)
    if group is not None:
        set_norm_group(model, group.images, _fake_ranks(group.ranks) if group.ranks > 1 else None)
    elif recipe.norm_group_images is not None and recipe.batch.slot * recipe.batch.micro_slots == 1:
        set_norm_group(model, None, _fake_ranks(2))


def _fake_ranks(count: int) -> FakeProcessGroup:
    return FakeProcessGroup._create_internal(0, count)
