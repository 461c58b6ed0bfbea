"""Engines allocate the model first and fill it then: the weights equal the plain model's to the bit on any ranks."""

import sys

import pytest
import torch

from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.engines.base import Engine
from pipeline.objectives import create_objective
from tests.engines import ENGINES, stage_recipe
from tests.ranks import on_ranks

CASES = [
    *[(stage, settings) for settings in ENGINES.values() for stage in ("pretrain", "finetune")],
    ("pretrain", {"kind": "fsdp", "offload": True, "precision": "bf16_parameters"}),
    ("finetune", {"kind": "deepspeed", "zero_stage": 3, "precision": "bf16_parameters"}),
    ("finetune", {"kind": "fsdp", "precision": "fp64"}),
]


def differing(world: World) -> dict[str, list[str]]:
    """By case: the names of the tensors that differ from the plain model's."""
    differences = {}
    for stage, settings in CASES:
        recipe = stage_recipe(stage, settings, model={"response": "bn"})
        objective = create_objective(recipe, seed=4)
        plain = objective.build_model().state_dict()
        gathered = create_engine(objective.build_model, recipe, world).gather()
        if world.is_main:
            assert gathered.keys() == plain.keys()
            other = [name for name, t in plain.items() if not torch.equal(t.to(gathered[name]), gathered[name])]
            differences[f"{stage} {settings}"] = other
    return differences


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_are_those_of_the_plain_model(ranks):
    differences = on_ranks(ranks, differing)[0]
    assert differences == {f"{stage} {settings}": [] for stage, settings in CASES}


def test_each_weight_is_drawn_once(monkeypatch):
    drawn = []
    module = sys.modules["pipeline.models.initialise"]  # its function of the same name hides it in the package
    honest = module._generator
    monkeypatch.setattr(module, "_generator", lambda name, seed: drawn.append(name) or honest(name, seed))
    recipe = stage_recipe("pretrain", "ddp")
    world = World.join("cpu", threads=1)
    try:
        state = torch.get_rng_state()
        engine = create_engine(create_objective(recipe, seed=4).build_model, recipe, world)
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        world.leave()
    names = {name for name, p in engine.module.named_parameters() if p.ndim > 1 and "grn" not in name}
    assert sorted(drawn) == sorted(names)


def test_weight_decay_does_not_depend_on_how_parameters_are_sharded(monkeypatch):
    recipe = stage_recipe("finetune", "ddp")
    with torch.device("meta"):
        model = create_objective(recipe, seed=4).build_model()
    wide = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}

    def empty(engine: Engine, model: torch.nn.Module) -> torch.nn.Module:
        for parameter in model.parameters():  # as ZeRO-3 does
            parameter.data = torch.empty(0, device="meta")
        return model

    monkeypatch.setattr(Engine, "__abstractmethods__", frozenset())
    monkeypatch.setattr(Engine, "_place", empty)
    groups = Engine(model, recipe, World.alone()).groups
    assert wide
    assert wide <= {name for group in groups if group.weight_decay for name in group.names}
