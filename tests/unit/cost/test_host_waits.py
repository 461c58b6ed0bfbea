"""Training never waits for the device: with all of its tensors on meta, the first host wait is an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.cost.host_waits import HostWaitError, NoHostWaits
from pipeline.cost.meta_step import META, as_on_gpu, meta_engine, run_meta_steps
from pipeline.cost.mixed_devices import MixedDevicesError, NoMixedDevices
from pipeline.data.batch import example_evaluation_batch
from pipeline.objectives import create_objective
from pipeline.training.step_guard import StepGuard
from tests.engines import batches, stage_recipe
from tests.object_batches import HEADS
from tests.unit.recipe.test_detection_settings import stage as detection_stage

STAGES = {
    "pretrain": {"ema": 0.9},
    "masked": {"objective": {"encoder_backend": "masked"}},
    "leaking": {"objective": {"encoder_leaks": True}},
    "unet": {"objective": {"decoder": "unet", "decoder_dim": 8}},
    "finetune": {"data": {"erase_probability": 1.0}, "ema": 0.9, "model": {"checkpointing": True}},
    "sparse": {"sparsity": {"sparsity": 0.5, "distribution": "uniform", "update_every_steps": 1}},
    "batchnorm": {"model": {"response": "bn"}},
}


def recipe_of(name: str, precision: str = "bf16"):
    stage = "pretrain" if name in ("pretrain", "masked", "leaking", "unet") else "finetune"
    return stage_recipe(stage, {"kind": "ddp", "precision": precision}, **STAGES[name])


def engine_of(recipe):
    return meta_engine(recipe, lambda device: StepGuard(recipe.health, device))


@pytest.mark.parametrize("name", STAGES)
def test_a_step_does_not_wait_for_the_device(name):
    engine, objective = engine_of(recipe_of(name))
    if sparsity := engine.component("sparsity"):  # counted once an attempt
        sparsity._counts = {name: weight.numel() // 2 for name, weight in sparsity.weights.items()}
    assert {"ema", "sparsity"} & STAGES[name].keys() <= {component.name for component in engine.components}
    run_meta_steps(engine, objective)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
@pytest.mark.parametrize("valid", [3, 4, 0])
def test_an_evaluation_does_not_wait_for_the_device(name, valid):
    engine, objective = engine_of(recipe_of(name))
    batch = batches(engine.recipe, 0)[0]
    batch.valid[valid:] = False
    with as_on_gpu(engine.recipe), NoHostWaits(), engine.evaluating() as model:
        sums = objective.evaluate(model, engine.to_device(batch))
    assert sums["loss"].device == META


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade"])
def test_a_step_and_a_test_of_a_detector_do_not_wait_for_the_device(head):
    """Every shape follows from the recipe and from numbers of objects, which the host knows."""
    heads = {**HEADS, "head": head, "box_loss": "giou" if head == "cascade" else "l1"}
    recipe = detection_stage(objective=heads, data={"views": {"test_size": [96, 64]}})
    engine, objective = engine_of(recipe)
    run_meta_steps(engine, objective, steps=1, micro_batches=1)
    batch = example_evaluation_batch(recipe)
    with as_on_gpu(recipe), NoHostWaits(), engine.evaluating() as model:
        found = objective.evaluate(model, engine.to_device(batch))
    assert found["boxes"].device == META


def test_a_planted_wait_fails_and_names_its_line(monkeypatch):
    engine, objective = engine_of(recipe_of("pretrain"))
    honest = objective.loss

    def waiting(*arguments):
        loss = honest(*arguments)
        loss.item()
        return loss

    monkeypatch.setattr(objective, "loss", waiting)
    line = waiting.__code__.co_firstlineno + 2
    with pytest.raises(HostWaitError, match=rf"^tests/unit/cost/test_host_waits.py:{line}: .*reads a value of the dev"):
        run_meta_steps(engine, objective)


def test_a_planted_mix_of_devices_fails(monkeypatch):
    engine, objective = engine_of(recipe_of("finetune"))
    honest = objective.loss
    monkeypatch.setattr(objective, "loss", lambda *arguments: honest(*arguments) * torch.ones(2))
    with pytest.raises(MixedDevicesError, match=r"^tests/unit/cost/test_host_waits.py:.*one of shape \(2,\) of the h"):
        run_meta_steps(engine, objective)


X, HOST = torch.zeros(3, 2, device=META), torch.ones(3, 2)
WAITS = {
    "reads a value": [X.sum().item, lambda: bool(X[0, 0]), lambda: X.nonzero(), lambda: X.masked_select(X > 0),
        lambda: X.unique(), lambda: torch.equal(X, X), lambda: X[0].repeat_interleave(X[1].long())],
    "selects by a mask": [lambda: X[X > 0], lambda: X[HOST > 0], lambda: X.index_put_((X > 0,), X[0, 0])],
    "copies an index": [lambda: X[torch.tensor([0, 2])]],
    "from the device to the host": [X.cpu, X.tolist, lambda: HOST.copy_(X), lambda: X.to("cpu", non_blocking=True)],
    "from the host to the device": [lambda: HOST.to(META), lambda: X.copy_(HOST), lambda: X[0] + HOST[0].to(META)],
    "copies its values": [lambda: torch.tensor([1.0, 2.0], device=META)],
}  # fmt: skip
FREE = [
    lambda: HOST.to(META, non_blocking=True), lambda: X.copy_(HOST, non_blocking=True), lambda: X + torch.tensor(1.0),
    lambda: X.index_select(0, torch.tensor([0, 2]).to(META, non_blocking=True)), lambda: torch.where(X > 0, X, 0.0),
    lambda: X[0].repeat_interleave(torch.ones(2, dtype=torch.int64, device=META), output_size=5), lambda: X[:2] + 1,
    HOST.sum().item, lambda: HOST[HOST > 0], lambda: torch.full((2,), 3.0, device=META), X.clone, lambda: X.double(),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "work"), [(reason, work) for reason, works in WAITS.items() for work in works])
def test_each_way_to_wait_is_refused(reason, work):
    with NoHostWaits(), pytest.raises(HostWaitError, match=reason):
        work()


def test_what_does_not_wait_is_let_through():
    with NoHostWaits():
        for work in FREE:
            work()


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_model_gets_no_tensor_of_the_host(name):
    """FSDP moves every tensor argument of the model to the GPU, so a tensor for the CPU would have to come back."""
    recipe = recipe_of(name)
    objective = create_objective(recipe, seed=0)
    with META:
        model = objective.build_model()
    inputs = []
    model.register_forward_pre_hook(lambda _, *arguments: inputs.extend(tree_leaves(arguments)), with_kwargs=True)
    with as_on_gpu(recipe):
        objective.loss(model, batches(recipe, 0)[0].to(META), 0)
    assert {value.device for value in inputs if isinstance(value, Tensor)} == {META}


WEIGHT, INDEX = torch.ones(5, 2), torch.tensor([0, 2])
MIXES = [
    lambda: X + HOST, lambda: X @ WEIGHT.t(), lambda: F.linear(X, WEIGHT), lambda: F.linear(HOST, X),
    lambda: X.index_select(0, INDEX), lambda: X.add_(HOST), lambda: HOST.add_(X), lambda: torch.cat([X, HOST]),
    lambda: torch._foreach_add_([X], [HOST]), lambda: F.embedding(INDEX, X),
]  # fmt: skip
ONE_DEVICE = [
    lambda: X + torch.tensor(1.0), lambda: HOST @ WEIGHT.t(), lambda: X @ X.t(), lambda: HOST.to(META),
    lambda: X.copy_(HOST),
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_operators_of_both_devices_are_refused(mix):
    with pytest.raises(MixedDevicesError), NoMixedDevices("meta"):
        mix()


@pytest.mark.parametrize("operation", ONE_DEVICE)
def test_copies_numbers_and_operators_of_one_device_pass(operation):
    with NoMixedDevices("meta"):
        operation()
