"""SLaK and Next-ViT in the engines: BatchNorm's buffers do not depend on ranks, and a resume has the same bits."""

import pytest

from pipeline.distributed.sharded_tensors import whole
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe
from tests.engines import ENGINES, largest_difference, resume_halfway, stage_recipe, train
from tests.ranks import on_ranks

MICRO = {
    "slak": {
        "name": "slak", "depths": [1, 2], "dims": [6, 10], "stem_stride": 2,
        "kernel_sizes": [9, 7], "small_kernel": 3, "layer_scale": 0.1, "checkpointing": True,
    },
    "nextvit": {
        "name": "nextvit", "depths": [1, 2, 2], "dims": [12, 24, 48], "stem_stride": 2, "stem_dim": 8, "head_dim": 4,
        "pattern": "CHH", "checkpointing": True,
    },
}  # fmt: skip


def recipe_of(family: str, engine: str, precision: str = "fp32") -> StageRecipe:
    return stage_recipe("finetune", {**ENGINES[engine], "precision": precision}, model=MICRO[family])


def trained(world: World, family: str, engine: str, precision: str, steps: int) -> tuple[list[float], dict]:
    run = train(world, recipe_of(family, engine, precision), range(steps))
    # as numpy: tensors are sent by way of the sender, which may be gone
    return run.losses, {name: whole(tensor).detach().numpy() for name, tensor in run.engine.items().items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["slak", "nextvit"])
def test_two_ranks_make_what_one_makes(family):
    """In float64, buffers included; FSDP too, which gathers block by block."""
    losses, tensors = on_ranks(1, trained, family, "ddp", "fp64", 6)[0]
    assert sum("running_" in name for name in tensors) > 6
    two_losses, two = on_ranks(2, trained, family, "ddp", "fp64", 6)[0]
    assert largest_difference(two_losses, losses) <= 1e-10
    for name, tensor in tensors.items():
        assert abs(two[name] - tensor).max() <= 1e-10, name
    assert largest_difference(on_ranks(2, trained, family, "fsdp", "fp64", 6)[0][0], losses) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", MICRO)
def test_sharded_engines_are_ddp(family, precision):
    """bf16 has 8 bits: what two ranks add in another order differs in the last of them."""
    losses, tensors = on_ranks(1, trained, family, "ddp", precision, 6)[0]
    loss_apart, apart = {"fp32": (1e-6, 1e-5), "bf16": (5e-4, 2e-2)}[precision]
    assert max(losses) - min(losses) > 3 * loss_apart * max(losses), "too little happens to tell anything"
    for engine in ("fsdp", "zero1", "zero2", "zero3"):
        found, others = on_ranks(2, trained, family, engine, precision, 6)[0]
        assert largest_difference(found, losses) <= loss_apart, engine
        for name, tensor in tensors.items():
            if "running_" in name:
                assert abs(others[name] - tensor).max() <= apart * max(abs(tensor).max(), 1), (engine, name)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("ddp", "fp32")] + [pytest.param(name, "bf16", marks=pytest.mark.slow) for name in ENGINES],
)
@pytest.mark.parametrize("family", MICRO)
def test_a_resume_has_the_same_bits(tmp_path, family, engine, precision):
    names, other = on_ranks(2, resume_halfway, recipe_of(family, engine, precision), 3, tmp_path)[0]
    assert any(name.startswith("ema.") and "running_var" in name for name in names)
    assert any(name.startswith("model.") and "running_mean" in name for name in names)
    assert other == []
