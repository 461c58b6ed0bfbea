"""What the ranks send each other in a step, by engine: bytes by formula, and the time over a site's links.

A ring moves (n - 1) / n of a tensor through each rank to gather or to scatter it among n ranks, and twice that to
all-reduce it. FSDP's padding counts. Scalars, such as the loss and the gradient norm, are left out.
"""

from typing import Literal, NamedTuple

from pipeline.cost.memory import ModelSize, engine_name, micro_batches, padded_parameters
from pipeline.engines.deepspeed_settings import zero_overlaps
from pipeline.engines.fsdp import keeps_gathered
from pipeline.recipe import StageRecipe

_REUSE = 1_000_000_000  # DeepSpeed's default, in elements
Moment = Literal["forward and backward", "last backward", "update"]


class Collective(NamedTuple):
    """Collectives of one kind in a step."""

    operation: Literal["all-reduce", "all-gather", "reduce-scatter"]
    content: str
    tensor_bytes: int
    """Of the whole tensors, summed over the step."""
    ranks: int
    """Of each group."""
    stride: int
    """Between the ranks of a group: so many groups work at the same time."""
    moment: Moment
    overlaps: bool
    """Whether the ranks compute meanwhile."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each rank sends in a step."""
        passes = 2 if self.operation == "all-reduce" else 1
        return passes * self.tensor_bytes * (self.ranks - 1) / self.ranks

    def seconds(self, ranks_per_node: int, node_bandwidth: float, network_bandwidth: float) -> float:
        """The time of all, if nothing else uses the links.

        Args:
            ranks_per_node: of the site.
            node_bandwidth: bytes a second of one rank to the others of its node.
            network_bandwidth: bytes a second of a whole node to the other nodes.
        """
        within = self.sent_bytes / node_bandwidth
        if self.ranks * self.stride <= ranks_per_node:
            return within
        # A ring leaves each of its nodes once, and all rings of a node share its network.
        return max(within, self.sent_bytes * min(self.stride, ranks_per_node) / network_bandwidth)


def step_collectives(recipe: StageRecipe, model: ModelSize, ranks: int) -> list[Collective]:
    """List the collectives of a step under the recipe's engine; none for a single rank."""
    name, precision = engine_name(recipe), recipe.engine.precision
    full = 8 if precision == "fp64" else 4
    low = 2 if precision == "bf16_parameters" else full
    micro = micro_batches(recipe, ranks)
    p, trained = model.parameters, model.trained
    found: list[Collective] = []

    def add(operation: str, content: str, size: int, moment: Moment, group: int, stride: int = 1) -> None:
        overlaps = moment != "update" and (not name.startswith("zero") or zero_overlaps(recipe, "cuda"))
        if group > 1:
            found.append(Collective(operation, content, size, group, stride, moment, overlaps))

    if name == "ddp":
        add("all-reduce", "gradients", full * trained.parameters, "last backward", ranks)
    elif name == "fsdp":
        shard = recipe.engine.shard_ranks or ranks
        # The parameters of a block are gathered for its forward pass, freed, and gathered again for its backward pass.
        # All others stay gathered in between.
        padded = padded_parameters(model.shapes, shard)
        gathered = low * micro * (2 * padded - padded_parameters(model.outside, shard))
        if keeps_gathered(recipe, ranks, p, "cuda"):
            gathered = low * padded
        add("all-gather", "parameters", gathered, "forward and backward", shard)
        scattered = full * padded_parameters(trained.shapes, shard)
        add("reduce-scatter", "gradients", scattered, "last backward", shard)
        add("all-reduce", "gradients of a shard", scattered // shard, "last backward", ranks // shard, stride=shard)
    elif name == "zero3":
        # What is used again within the reuse distance stays gathered: at the turn from forward to backward pass, the
        # last half of that many parameters.
        zero = recipe.engine.deepspeed.get("zero_optimization", {})
        again = max(p - int(zero.get("stage3_max_reuse_distance", _REUSE)) // 2, 0)
        add("all-gather", "parameters", low * micro * (p + again), "forward and backward", ranks)
        add("reduce-scatter", "gradients", full * micro * p, "forward and backward", ranks)
    else:
        # ZeRO 1 and 2 all-reduce buckets that belong to several ranks whole (use_multi_rank_bucket_allreduce); ZeRO 2
        # does so in each micro-batch.
        reductions = micro if name == "zero2" else 1
        moment: Moment = "forward and backward" if name == "zero2" else "last backward"
        add("all-reduce", "gradients", full * reductions * p, moment, ranks)
        add("all-gather", "updated parameters", low * p, "update", ranks)
    if model.buffers:
        add("all-reduce", "running statistics", full * model.buffers, "update", ranks)
    return found + _norm_statistics(recipe, model, ranks, full)


def _norm_statistics(recipe: StageRecipe, model: ModelSize, ranks: int, width: int) -> list[Collective]:
    """The sums of each BatchNorm over a norm group that spans ranks, in forward and backward pass; none overlaps.

    A forward sums a row of means and variances for each rank, a backward two sums. Both are of `width` bytes a number.
    """
    group, batch = recipe.norm_group_on(ranks), recipe.batch_on(ranks)
    if group is None or group.ranks == 1 or not model.norm_channels:
        return []
    forward = model.norm_channels + (model.block_norm_channels if recipe.model.checkpointing else 0)
    passes = micro_batches(recipe, ranks) * batch.slot * batch.micro_slots // group.images
    size = passes * width * 2 * (group.ranks * forward + model.norm_channels)
    content = "statistics of norm groups"
    return [Collective("all-reduce", content, size, group.ranks, 1, "forward and backward", overlaps=False)]
