import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.models import ConvNeXtV2
from pipeline.models.fcmae import FCMAE
from pipeline.weights import encoder_to_classifier, plan_transfer

PRETRAINING = ("mask_token", "proj.", "decoder.", "pred.")


def fcmae():
    model = FCMAE(ConvNeXtV2((1, 1, 1), (4, 8, 8), 0, stem_stride=2), decoder_dim=8)
    with torch.no_grad():
        for index, value in enumerate(model.state_dict().values()):
            value.fill_(index + 1)
    return model.state_dict()


def classifier(classes=10):
    return ConvNeXtV2((1, 1, 1), (4, 8, 8), classes, stem_stride=2).state_dict()


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_pretraining_hands_its_encoder_to_the_classifier():
    source, target = encoder_to_classifier(fcmae()), classifier()
    plan = plan_transfer(shapes(source), shapes(target), drop=PRETRAINING, fresh=("norm.", "head."))
    assert plan.initialised == ("head.bias", "head.weight", "norm.bias", "norm.weight")
    assert set(plan.loaded) | set(plan.initialised) == target.keys()
    assert set(plan.loaded) | set(plan.dropped) == source.keys()
    assert all(name.split(".")[0] in {"mask_token", "proj", "decoder", "pred"} for name in plan.dropped)
    assert sum("grn" in name for name in plan.loaded) == 6
    for name in plan.loaded:
        assert torch.equal(source[name], fcmae()[f"encoder.{name}"])


def test_converting_twice_changes_nothing():
    for state in (fcmae(), classifier()):
        once = encoder_to_classifier(state)
        twice = encoder_to_classifier(once)
        assert once.keys() == twice.keys()
        assert all(once[name] is twice[name] for name in once)
    assert shapes(once) == shapes(classifier())


def test_a_new_head_of_another_size_or_the_same():
    for classes in (10, 3):
        plan = plan_transfer(shapes(classifier(classes)), shapes(classifier(10)), drop=(), fresh=("head.",))
        assert plan.initialised == plan.dropped == ("head.bias", "head.weight")
        assert "norm.weight" in plan.loaded


def test_the_same_task_loads_everything():
    plan = plan_transfer(shapes(classifier()), shapes(classifier()), drop=(), fresh=())
    assert (plan.initialised, plan.dropped) == ((), ())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "head.weight",
            (3, 8),
            r"head\.weight is \(3, 8\) in the weights and \(10, 8\) in the model; list it as fresh",
        ),
        ("stages.0.0.grn.gamma", (1, 1, 1, 1, 1, 16), r"stages\.0\.0\.grn\.gamma is \(1, 1, 1, 1, 1, 16\)"),
        ("stages.0.0.grn.gamma", None, r"stages\.0\.0\.grn\.gamma is absent in the weights and \(1, 1, 1, 16\)"),
        ("extra", (), r"extra is \(\) in the weights and absent in the model; list it as dropped"),
        ("headless", (2,), r"headless is \(2,\)"),
    ],
)
def test_anything_unexpected_is_named(name, change, message):
    source = shapes(classifier())
    if change is None:
        del source[name]
    else:
        source[name] = change
    with pytest.raises(CheckpointError, match=message) as caught:
        plan_transfer(source, shapes(classifier()), drop=("head",), fresh=())
    assert "\n" not in str(caught.value)


names = st.sampled_from(["a", "a.b", "a.c", "ab", "b.a", "c"])
sides = st.dictionaries(names, st.sampled_from([(), (1,), (2, 1)]))
patterns = st.lists(st.sampled_from(["a", "a.", "a.b", "b.", "c"])).map(tuple)


@given(sides, sides, patterns, patterns)
def test_a_plan_accounts_for_every_tensor_or_is_refused(source, target, drop, fresh):
    try:
        plan = plan_transfer(source, target, drop=drop, fresh=fresh)
    except CheckpointError:
        listed = {name for name in source if {name, "".join(name.partition(".")[:2])} & set(drop)}
        new = {name for name in target if {name, "".join(name.partition(".")[:2])} & set(fresh)}
        rest = {name: shape for name, shape in source.items() if name not in listed | new}
        assert rest != {name: shape for name, shape in target.items() if name not in new}
        return
    assert sorted(plan.loaded + plan.initialised) == sorted(target)
    assert sorted(plan.loaded + plan.dropped) == sorted(source)
    assert all(source[name] == target[name] for name in plan.loaded)


@pytest.mark.parametrize(
    "strange",
    [
        {"stem.0.weight": 1},
        {"encoder.stages.0.x": 1, "stages.0.x": 1},
        {"encoder.encoder.stages.0": 1},
        {"encoder": 1},
        {"encoderstages.0": 1},
        {"encoder.stages.0.x": 1, "head.weight": 1},
        {"module.encoder.stages.0.x": 1},
        {},
    ],
)
def test_other_layouts_are_refused(strange):
    with pytest.raises(CheckpointError):
        encoder_to_classifier(strange)
