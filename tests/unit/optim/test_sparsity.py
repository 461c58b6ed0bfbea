"""Masks in a world of one: they hold after every update, move as they should, and are in the checkpoint."""

import json

import pytest
import torch
import torch.nn.functional as F

from pipeline.engines import create_engine
from pipeline.errors import RecipeError
from pipeline.objectives import create_objective
from pipeline.objectives.pixels import normalise
from pipeline.recipe import StageRecipe
from pipeline.training.initial_sparsity import start_sparsity
from tests.engines import batches, bits, stage_recipe, store
from tests.object_batches import HEADS, object_batch
from tests.unit.recipe.test_detection_settings import stage as detection_stage

SPARSITY = {"sparsity": 0.4, "update_every_steps": 2}
TOTAL = 9


def build(world, sparsity, engine="ddp", **changes):
    recipe = stage_recipe("finetune", engine, sparsity={**SPARSITY, **sparsity}, **changes)
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components(TOTAL)
    return engine, objective


def start(world, sparsity=None, engine="ddp", **changes):
    engine, objective = build(world, sparsity or {}, engine, **changes)
    densities = start_sparsity(engine, objective, batches(engine.recipe, 0))
    return engine, objective, densities


def make(engine, objective, *steps: int, lr: float = 1e-2):
    for step in steps:
        engine.step(batches(engine.recipe, step), objective, step=step, lr=lr, should_stop=lambda: False)


def masks(engine) -> dict[str, torch.Tensor]:
    return {name: mask.clone() for name, mask in engine.component("sparsity").state().items()}


def zeros_hold(engine) -> bool:
    averages = engine.component("ema").state()
    return all(
        not engine.items()[name][~mask].any() and not averages[name][~mask].any()
        for name, mask in engine.component("sparsity").state().items()
    )


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_hold_after_every_update_and_move_without_growing_denser(world, precision, growth):
    """Under autocast and accumulation: four micro-batches make a step."""
    engine, objective, densities = start(world, {"growth": growth}, {"kind": "ddp", "precision": precision})
    assert zeros_hold(engine)
    before, moves = masks(engine), []
    for step in range(TOTAL):
        make(engine, objective, step)
        assert zeros_hold(engine)
        assert engine.component("sparsity").densities() == densities
        now = masks(engine)
        moves.append(sum(int((now[name] != before[name]).sum()) for name in now))
        before = now
    assert [bool(moved) for moved in moves] == [step + 1 in (2, 4, 6, 8) for step in range(TOTAL)]
    size = sum(mask.numel() for mask in before.values())
    assert sum(int(mask.sum()) for mask in before.values()) / size == pytest.approx(0.6, abs=0.02)


def test_densities_are_the_solution_of_snip(world):
    """Computed again here in another way: one batch, one backward pass, a sort."""
    engine, objective = build(
        world, {}, objective={"drop_path": 0.0}, data={"erase_probability": 0.0}, model={"dims": [12, 20]}
    )
    model, recipe = objective.build_model().double(), engine.recipe
    slots = batches(recipe, 0)
    images, labels = torch.cat([b.images for b in slots]), torch.cat([b.labels for b in slots])
    F.cross_entropy(model(normalise(images, torch.float64)), labels).backward()
    scores = {
        name: (parameter * parameter.grad).detach().abs().flatten().numpy()
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and parameter.ndim > 1
    }
    every = sorted((float(s) for score in scores.values() for s in score), reverse=True)
    threshold = every[int(len(every) * 0.6) - 1]
    expected = {name: float((score > threshold).mean()) for name, score in scores.items()}
    expected = {name: 1.0 if density >= 0.99 else density for name, density in expected.items()}
    found = start_sparsity(engine, objective, slots)
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(found) == 12
    assert len(set(found.values())) > 6
    # Mixing and smoothing are for the training alone.
    assert objective.settings.mixup > 0


def test_a_checkpoint_goes_on_to_the_bit(world, tmp_path):
    engine, objective, _ = start(world, {"growth": "gradient"})
    make(engine, objective, *range(5))
    state = engine.state(5)
    assert state["sparsity"]["stages.0.0.dwconv.weight"].dtype == torch.bool
    store(tmp_path, world).save(state, step=5, why="due")
    again, objective_again = build(world, {"growth": "gradient"})
    assert store(tmp_path, world).restore(again.state(0)) == 5
    assert bits(again) == bits(engine)
    make(engine, objective, *range(5, TOTAL))
    make(again, objective_again, *range(5, TOTAL))
    assert bits(again) == bits(engine)


def test_a_refused_step_moves_nothing(world):
    engine, objective, _ = start(world)
    make(engine, objective, 0)
    before = bits(engine)
    honest = objective.loss
    objective.loss = lambda *arguments: honest(*arguments) * torch.nan
    make(engine, objective, 1)  # the second update is due to move zeros
    assert bits(engine) == before
    objective.loss = honest
    make(engine, objective, 1)
    assert bits(engine) != before


def test_gradient_growth_takes_the_largest_gradients(world):
    engine, objective, _ = start(world, {"growth": "gradient", "prune_rate": 0.5})
    make(engine, objective, 0)
    sparsity, name = engine.component("sparsity"), "stages.1.1.pwconv1.weight"
    before, seen = masks(engine)[name], {}
    taken = sparsity.before_update
    sparsity.before_update = lambda step: (
        taken(step),
        seen.update({n: g.clone() for n, g in sparsity._gradients.items()}),
    )
    make(engine, objective, 1)
    after, gradient = masks(engine)[name], seen[name].abs()
    assert (after & ~before).any()
    assert gradient[after & ~before].min() >= gradient[~after & ~before].max()


@pytest.mark.parametrize("moments", ["kept", "zeroed"])
def test_moments_of_zero_weights(world, moments):
    engine, objective, _ = start(world, {"moments": moments})
    make(engine, objective, 0, 1, 2)
    held = [
        bool(entry[key][~mask].any())
        for name, mask in masks(engine).items()
        if not mask.all()
        for entry, key in ((engine.state(0)["optim"][name], "exp_avg"), (engine.state(0)["optim"][name], "exp_avg_sq"))
    ]
    assert held == [moments == "kept"] * len(held)
    assert len(held) > 10


def test_what_is_grown_starts_at_zero_and_its_average_at_its_first_value(world):
    engine, objective, _ = start(world)
    make(engine, objective, 0)
    before = masks(engine)
    make(engine, objective, 1)
    grown = {name: mask & ~before[name] for name, mask in masks(engine).items()}
    assert sum(int(new.sum()) for new in grown.values()) > 50
    assert all(not engine.items()[name][new].any() for name, new in grown.items())
    make(engine, objective, 2)
    averages, trained = engine.component("ema").state(), 0
    for name, new in grown.items():
        trained += int((engine.items()[name][new] != 0).sum())
        assert torch.equal(engine.items()[name][new], averages[name][new])
    assert trained > 50


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_distributions_by_shape(world, distribution):
    engine, _, densities = start(world, {"distribution": distribution, "update_every_steps": None})
    size = sum(mask.numel() for mask in masks(engine).values())
    share = sum(
        density * mask.numel() for density, mask in zip(densities.values(), masks(engine).values(), strict=True)
    )
    assert share / size == pytest.approx(0.6, abs=0.01)
    assert (len(set(densities.values())) > 3) == (distribution == "erk")


def test_zeros_that_were_handed_on_stay(world):
    engine, objective = build(world, {"distribution": "handed_on", "update_every_steps": None})
    weight = engine.items()["stages.0.0.pwconv1.weight"]
    weight[::2] = 0
    densities = start_sparsity(engine, objective, iter(()))
    assert densities["stages.0.0.pwconv1.weight"] == 0.5
    make(engine, objective, 0, 1)
    assert not weight[::2].any()
    assert weight[1::2].all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": {"kind": "deepspeed"}}, "engine.kind is deepspeed.* set it to ddp or fsdp"),
        (
            {"init": {"start": "scratch"}, "sparsity": {"distribution": "handed_on"}},
            "handed_on but init.start is scratch",
        ),
        ({"sparsity": {"sparsity": 1.0}}, "less than 1"),
        ({"sparsity": {"growth": "momentum"}}, "'random' or 'gradient'"),
        ({"sparsity": {"prune": 0.3}}, "prune"),
    ],
)
def test_what_cannot_be_is_said_at_validation(changes, sentence):
    recipe = stage_recipe("finetune", "ddp", sparsity={}).model_dump(mode="json")
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values}
    with pytest.raises(ValueError, match=sentence):
        StageRecipe.model_validate_json(json.dumps(recipe))


def test_decomposed_needs_decomposed_kernels(world):
    with pytest.raises(RecipeError, match=r"decomposed but this model has no large_kernel\.LoRA"):
        build(world, {"weights": "decomposed"})


@pytest.mark.parametrize(
    "sparsity", [{"distribution": "erk"}, {"distribution": "snip", "growth": "gradient", "moments": "zeroed"}]
)
def test_frozen_weights_are_neither_zeroed_nor_moved(world, sparsity):
    sparsity = {"sparsity": 0.4, "update_every_steps": 1, **sparsity}
    batch, heads = {"global_batch": 2}, {**HEADS, "frozen_stages": 2}
    recipe = detection_stage(objective=heads, batch=batch, sparsity=sparsity)
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components(TOTAL)
    frozen = {n: p.detach().clone() for n, p in engine.module.named_parameters() if not p.requires_grad}
    assert any(weight.ndim == 4 for weight in frozen.values())
    start_sparsity(engine, objective, [object_batch(range(1))])
    before = masks(engine)
    assert before
    assert not before.keys() & frozen.keys()
    for step in range(2):
        engine.step([object_batch(range(1))], objective, step=step, lr=1e-3, should_stop=lambda: False)
    assert any((mask != before[name]).any() for name, mask in masks(engine).items())
    assert all(torch.equal(engine.items()[name], weight) for name, weight in frozen.items())
