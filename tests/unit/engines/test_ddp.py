"""Optimizer steps on one rank: the result does not depend on how the batch is cut into micro-batches."""

import pytest
import torch
from torch import nn

from pipeline.engines import StepFilter, create_engine
from pipeline.engines.adamw import AdamW
from pipeline.objectives import create_objective
from pipeline.optim.groups import Group
from pipeline.recipe import load_recipe
from tests.engines import batches
from tests.support import write_tiny_recipe


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("engine"))


def trained(recipe_file, world, stage: str, steps: int, *overrides: str, guard: StepFilter | None = None):
    recipe = load_recipe(recipe_file, [f"stages.{stage}.{o}" for o in overrides]).stages[stage]
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world, guard)
    engine.attach_components()
    losses = [
        engine.step(batches(recipe, s), objective, step=s, lr=1e-3, should_stop=lambda: False).loss.item()
        for s in range(steps)
    ]
    return engine, objective, losses


def flat(engine, step=0):
    state = engine.state(step)
    tensors = {f"{part}.{name}": t for part in ("model", "ema") for name, t in state.get(part, {}).items()}
    return tensors | {f"{name}.{key}": t for name, entry in state["optim"].items() for key, t in entry.items()}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_accumulation_is_the_whole_batch(recipe_file, world, stage):
    one, _, losses = trained(recipe_file, world, stage, 4, "engine.precision=fp64", "batch.micro_slots=1")
    four, _, again = trained(recipe_file, world, stage, 4, "engine.precision=fp64", "batch.micro_slots=4")
    assert losses == pytest.approx(again, rel=1e-12)
    for name, tensor in flat(one).items():
        assert torch.allclose(tensor, flat(four)[name], rtol=1e-8, atol=1e-12), name


def test_a_stop_inside_a_step_changes_nothing(recipe_file, world):
    engine, objective, _ = trained(recipe_file, world, "finetune", 2)
    before = {name: tensor.clone() for name, tensor in flat(engine).items()}
    asked = iter([False, False, True])
    report = engine.step(
        batches(engine.recipe, 2), objective, step=2, lr=1e-3, should_stop=lambda: next(asked)
    )  # fmt: skip
    assert report is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat(engine).items())
    undisturbed, _, _ = trained(recipe_file, world, "finetune", 3)
    engine.step(batches(engine.recipe, 2), objective, step=2, lr=1e-3, should_stop=lambda: False)
    assert all(torch.equal(tensor, flat(engine)[name]) for name, tensor in flat(undisturbed).items())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bf16_is_near_fp32_and_keeps_fp32_weights(recipe_file, world, stage):
    engine, _, losses = trained(recipe_file, world, stage, 4, "engine.precision=bf16")
    assert all(tensor.dtype == torch.float32 for tensor in flat(engine).values())
    assert losses == pytest.approx(trained(recipe_file, world, stage, 4)[2], rel=0.02)


def test_learning_rates_decay_with_depth(recipe_file, world):
    engine, _, _ = trained(recipe_file, world, "finetune", 1)
    rates = sorted({group["lr"] for group in engine._optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([1e-3 * 0.8**k for k in range(4)])


def test_evaluation_uses_the_handed_on_weights_and_gives_the_others_back(recipe_file, world):
    engine, _, _ = trained(recipe_file, world, "finetune", 3)
    live = {name: tensor.clone() for name, tensor in engine.items().items()}
    average = {name: tensor.clone() for name, tensor in engine.component("ema").state().items()}
    with engine.evaluating() as model:
        assert not model.training
        assert all(torch.equal(tensor, average[name]) for name, tensor in engine.items().items())
    assert model.training
    assert all(torch.equal(tensor, live[name]) for name, tensor in engine.items().items())


def test_gradients_are_clipped_and_the_norm_before_is_reported(recipe_file, world):
    reports = []
    for clip in ("null", "0.001"):
        recipe = load_recipe(recipe_file, [f"stages.finetune.optimizer.clip_norm={clip}"]).stages["finetune"]
        objective = create_objective(recipe, seed=4)
        engine = create_engine(objective.build_model, recipe, world)
        engine.attach_components()
        reports.append(engine.step(batches(recipe, 0), objective, step=0, lr=1e-3, should_stop=lambda: False))
    assert reports[0].gradient_norm.item() == pytest.approx(reports[1].gradient_norm.item())
    assert reports[0].gradient_norm.item() > 0.01


@pytest.mark.parametrize("accepted", [True, False])
def test_the_optimizer_has_the_bits_of_torchs(accepted):
    torch.manual_seed(0)
    tensors = [torch.randn(5, n + 1) for n in range(6)]
    made = [[nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2)]
    optimizers = [AdamW([Group((), p[:3], 0.5, 0.1), Group((), p[3:], 1.0, 0.0)], (0.9, 0.95)) for p in made]
    for step in range(3):
        for parameters, optimizer, torchs in zip(made, optimizers, (False, True), strict=True):
            if step == 0:
                optimizer.make_state(parameters)
            for parameter in parameters:
                parameter.grad = parameter.detach().sin() * (step + 1)
            parameters[4].grad = None
            optimizer.prepare(1e-2, torch.tensor(accepted or step == 0))
            torch.optim.AdamW.step(optimizer) if torchs else optimizer.step()
    states = [[value for entry in optimizer.state.values() for value in entry.values()] for optimizer in optimizers]
    assert all(torch.equal(one, two) for one, two in zip(made[0] + states[0], made[1] + states[1], strict=True))


class Refusing(StepFilter):
    """Refuses all steps while `on`, and keeps the last loss and gradient norm that it was given."""

    name, on = "refusing", False

    def accept(self, loss, gradient_norm):
        self.given = loss.item(), gradient_norm.item()
        return loss.isfinite() & gradient_norm.isfinite() & (not self.on)

    def state(self):
        return {}


@pytest.mark.parametrize("response", ["grn", "bn"])
@pytest.mark.parametrize("guard", [None, Refusing()])
def test_a_step_that_is_not_accepted_changes_nothing(recipe_file, world, response, guard):
    """Without a guard a step with a NaN; with one, a step that the guard refuses."""
    engine, objective, _ = trained(recipe_file, world, "finetune", 2, f"model.response={response}", guard=guard)
    before = {name: tensor.clone() for name, tensor in flat(engine).items()}

    def step():
        return engine.step(batches(engine.recipe, 2), objective, step=2, lr=1e-3, should_stop=lambda: False)

    def same() -> bool:
        return all(torch.equal(tensor, before[name]) for name, tensor in flat(engine).items())

    if guard:
        guard.on = True
        report = step()
        assert guard.given == (pytest.approx(report.loss.item()), pytest.approx(report.gradient_norm.item()))
        guard.on = False
    else:
        with pytest.MonkeyPatch.context() as patch:
            honest = objective.loss
            patch.setattr(objective, "loss", lambda *a: honest(*a) * (torch.nan if 2 in a[1].slots else 1))
            report = step()
    assert not report.accepted
    assert same()
    assert step().accepted
    assert not same()
    undisturbed, _, _ = trained(recipe_file, world, "finetune", 3, f"model.response={response}")
    assert all(torch.equal(tensor, flat(engine)[name]) for name, tensor in flat(undisturbed).items())


def test_running_statistics_do_not_depend_on_the_order_of_the_slots(recipe_file, world):
    states = []
    for order in (1, -1):
        recipe = load_recipe(recipe_file, ["stages.finetune.model.response=bn"]).stages["finetune"]
        objective = create_objective(recipe, seed=4)
        engine = create_engine(objective.build_model, recipe, world)
        engine.warm_up(batches(recipe, 9)[0], objective)
        assert all(torch.equal(b, torch.zeros_like(b)) for name, b in engine.items().items() if "running_mean" in name)
        engine.step(batches(recipe, 0)[::order], objective, step=0, lr=0.0, should_stop=lambda: False)
        states.append({name: b for name, b in engine.items().items() if "running" in name})
    assert states[0]
    for name, buffer in states[0].items():
        assert torch.allclose(buffer, states[1][name], rtol=1e-6), name
        assert buffer.abs().sum() > 0


def test_threads_are_what_is_granted_and_those_before_where_there_are_so_many(world, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = world.cores()
    assert world.threads() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (world.threads(), world.threads(before=cores), world.threads(before=cores + 1)) == (1, cores, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", f"{cores + 1},2")  # threads in threads
    assert (world.threads(), world.threads(before=cores + 1)) == (cores + 1, cores + 1)
