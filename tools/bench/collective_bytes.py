"""The bytes that a rank sends in a step, by engine and number of ranks: by formula, or counted against it.

    python -m tools.bench.collective_bytes [--model NAME] [--ranks 8 64 512] [--micro-batches 2]
    python -m tools.bench.collective_bytes --count [--ranks 2 4]

With --count real ranks on this machine make a step of a small model under each engine, and every collective is counted.
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.cost.collectives import Collective, step_collectives
from pipeline.cost.memory import ModelSize
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe
from tools.bench.timing import print_header, print_row
from tools.bench.workload import random_batch, run_ranks, stage_recipe

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"precision": "bf16"}),
    "fsdp": ("fsdp", {"precision": "bf16"}),
    "fsdp, each micro-batch gathers": ("fsdp", {"precision": "bf16", "keep_gathered": False}),
    "fsdp, bf16_parameters": ("fsdp", {"precision": "bf16_parameters"}),
    "fsdp, bf16_parameters, shard_ranks 8": ("fsdp", {"precision": "bf16_parameters", "shard_ranks": 8}),
    "zero1": ("zero1", {"precision": "bf16"}),
    "zero2": ("zero2", {"precision": "bf16"}),
    "zero3": ("zero3", {"precision": "bf16", "deepspeed": {}}),  # DeepSpeed's own sizes of buckets and distances
}
_OPERATIONS = {
    "allreduce_": "all-reduce", "allgather_": "all-gather", "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter", "reduce_scatter_tensor_coalesced_": "reduce-scatter",
}  # fmt: skip


def recipe_of(variant: str, model: str, ranks: int, micro_batches: int, **changes: Any) -> StageRecipe:
    """FCMAE at 224 px under a variant; each rank has so many micro-batches of one slot."""
    engine, settings = VARIANTS[variant]
    recipe = stage_recipe("pretrain", engine, model, ranks * micro_batches, **changes)
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=settings)})


class CollectivesCounter(TorchDispatchMode):
    """Counts the bytes of the whole tensors of each kind of collective. Scalars and messages of a few bytes count 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function._overloadpacket.__name__
            sizes = [leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
            parts = name in ("allgather_", "reduce_scatter_")  # lists of tensors: one whole, and its parts
            self.bytes[_OPERATIONS.get(name, name)] += sum(sizes) // 2 if parts else max(sizes, default=0)
        return function(*args, **(kwargs or {}))


def count_step(world: World, recipe: StageRecipe) -> dict[str, int]:
    """Make two steps, and return the bytes of the second one's collectives by operation."""
    objective = create_objective(recipe, seed=0)
    engine = create_engine(objective.build_model, recipe, world)
    batches = [random_batch(recipe, 0, rank) for rank in range(world.rank, recipe.batch.slots, world.size)]
    engine.warm_up(batches[0], objective)
    engine.step(batches, objective, step=0, lr=1e-4, should_stop=lambda: False)
    with CollectivesCounter() as counter:
        engine.step(batches, objective, step=1, lr=1e-4, should_stop=lambda: False)
    return {name: size for name, size in counter.bytes.items() if size}


def small_recipe(variant: str, ranks: int, micro_batches: int) -> StageRecipe:
    """A stage that is counted in seconds; on the CPUs of this machine FSDP does as it does on GPUs."""
    recipe = recipe_of(variant, "convnextv2_atto", ranks, micro_batches, image_size=64, checkpointing=False)
    settings: dict[str, Any] = {"device": "cpu", "threads": 1}
    if recipe.engine.kind == "fsdp" and recipe.engine.keep_gathered == "auto":
        settings["keep_gathered"] = True
    if recipe.engine.kind == "deepspeed":
        sizes = (
            "reduce_bucket_size",
            "stage3_prefetch_bucket_size",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "sub_group_size",
        )
        settings["deepspeed"] = {"zero_optimization": dict.fromkeys(sizes, 1_000_000)}
        settings["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if recipe.engine.shard_ranks:
        settings["shard_ranks"] = ranks // 2
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=settings)})


def by_operation(collectives: list[Collective]) -> Counter[str]:
    """The bytes of the whole tensors by operation, as `count_step` counts them."""
    total: Counter[str] = Counter()
    for each in collectives:
        total[each.operation] += each.tensor_bytes
    return total


def _print_formulas(options: argparse.Namespace) -> None:
    ranks, micro = options.ranks or [8, 64, 512], options.micro_batches
    print(f"{options.model}, FCMAE, {micro} micro-batches a step; GB that a rank sends in a step, by formula\n")
    print_header(["engine", "collective", *(f"{n} ranks" for n in ranks)])
    for variant in VARIANTS:
        rows: dict[str, list[str]] = {}
        for place, number in enumerate(ranks):
            recipe = recipe_of(variant, options.model, number, micro)
            for each in step_collectives(recipe, ModelSize.of(recipe), number):
                row = rows.setdefault(f"{each.operation}: {each.content}", ["-"] * len(ranks))
                row[place] = f"{each.sent_bytes / 1e9:.2f}"
        for name, cells in rows.items():
            print_row([variant, name, *cells])


def _print_counts(options: argparse.Namespace) -> None:
    print_header(["engine", "ranks", "collective", "counted, MB", "formula, MB", "ratio"])
    for number in options.ranks or [2, 4]:
        for variant in VARIANTS:
            recipe = small_recipe(variant, number, options.micro_batches)
            counted = run_ranks(count_step, number, recipe)[0]
            expected = by_operation(step_collectives(recipe, ModelSize.of(recipe), number))
            for name in sorted(counted.keys() | expected.keys()):
                a, b = counted.get(name, 0), expected.get(name, 0)
                ratio = f"{a / b:.3f}" if b else "-"
                print_row([variant, number, name, f"{a / 1e6:.3f}", f"{b / 1e6:.3f}", ratio])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnextv2_huge")
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    (_print_counts if options.count else _print_formulas)(options)


if __name__ == "__main__":
    main()
