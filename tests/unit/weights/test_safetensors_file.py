import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.models import ConvNeXtV2
from pipeline.models.fcmae import FCMAE
from pipeline.weights import encoder_to_classifier, plan_transfer, read_facts, read_weights, write_weights

FACTS = {"variant": "convnextv2", "step": 7, "depths": [1, 2], "of": {"b": 1, "a": None}}
PRETRAINING = ("mask_token", "proj.", "decoder.", "pred.")


def tensors():
    return {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.tensor(0.1), "n": torch.tensor([3, 4])}


def fcmae():
    model = FCMAE(ConvNeXtV2((1, 1, 1), (4, 8, 8), 0, stem_stride=2), decoder_dim=8, cell=8)
    with torch.no_grad():
        for index, value in enumerate(model.state_dict().values()):
            value.fill_(index + 1)
    return model.state_dict()


def classifier(classes=10):
    return ConvNeXtV2((1, 1, 1), (4, 8, 8), classes, stem_stride=2).state_dict()


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_weights_come_back_as_fp32_with_their_facts(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    whole = torch.randn(4, 4, dtype=torch.float64)
    given = {**tensors(), "half": whole[:2], "also": whole[:2], "bf16": torch.ones(3, dtype=torch.bfloat16)}
    sha256 = write_weights(path, given, FACTS)
    found = read_weights(path, sha256)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert read_facts(path) == FACTS
    assert os.listdir(path.parent) == [path.name]


def test_the_bytes_depend_on_nothing_but_the_content(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_safetensors_file as t;"
        "items = list(t.tensors().items()); facts = dict(reversed(t.FACTS.items()));"
        "print(t.write_weights(sys.argv[2], dict(reversed(items)), facts))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    printed = {run.communicate()[0].strip() for run in runs}
    assert printed == {write_weights(tmp_path / "here", tensors(), FACTS)}
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "here").read_bytes()


def test_a_missing_file_names_path_and_remedy(tmp_path):
    for read in (read_weights, read_facts):
        with pytest.raises(CheckpointError, match=r"nowhere\.safetensors.*run the stage"):
            read(tmp_path / "nowhere.safetensors")


def test_another_files_hash_is_refused(tmp_path):
    sha256 = write_weights(tmp_path / "w", tensors(), FACTS)
    write_weights(tmp_path / "w", tensors(), {**FACTS, "step": 8})
    with pytest.raises(CheckpointError, match=f"instead of {sha256}"):
        read_weights(tmp_path / "w", sha256)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere_is_refused(tmp_path, data):
    sha256 = write_weights(tmp_path / "w", tensors(), FACTS)
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for expected in (None, sha256):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / "w", expected)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_another_kind_of_file_has_no_facts(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_facts(tmp_path / "w")


def test_facts_are_one_canonical_key(tmp_path):
    write_weights(tmp_path / "w", tensors(), FACTS)
    data = (tmp_path / "w").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata == {"fcmae": '{"depths":[1,2],"of":{"a":null,"b":1},"step":7,"variant":"convnextv2"}'}


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
