import json

import pytest
import torch

from pipeline.errors import CheckpointError, UserError
from pipeline.weights.architecture import ConvNeXtArchitecture
from pipeline.weights.foreign import load_weights
from pipeline.weights.safetensors_file import read_facts, write_weights
from tests.oracles import assert_same, random_weights
from tests.support import fcmae
from tools.weights.convert import convert

CLASSIFIER = ConvNeXtArchitecture((1, 1, 2, 1), (4, 8, 8, 8), norm=True, classes=3)
PRETRAINING = ConvNeXtArchitecture((1, 1, 2, 1), (4, 8, 8, 8), decoder=(8, 1))


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("to", ["official", "timm", "transformers"])
def test_twice_is_once_and_back_is_the_same(tmp_path, to, suffix):
    ours = random_weights(CLASSIFIER)
    first = convert(saved(tmp_path / "w.pth", {"model": ours, "epoch": 3}), tmp_path / f"1{suffix}", to)
    second = convert(tmp_path / f"1{suffix}", tmp_path / f"2{suffix}", to)
    assert first.sha256 == second.sha256
    assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()
    assert first.report.ignored == ("epoch",)
    assert not first.report.dropped
    assert len(first.written) == len(ours)
    convert(tmp_path / f"2{suffix}", tmp_path / "back.pth", "official")
    assert_same(load_weights(tmp_path / "back.pth").tensors, ours)  # float64 stays float64
    assert_same(torch.load(tmp_path / "back.pth")["model"], ours)


def test_facts_of_ours_stay_and_say_what_was_written(tmp_path):
    source = tmp_path / "w.safetensors"
    write_weights(source, random_weights(CLASSIFIER), {"stage": "finetune", "image_size": 64})
    convert(source, tmp_path / "timm.safetensors", "timm")
    facts = read_facts(tmp_path / "timm.safetensors")
    assert (facts["stage"], facts["image_size"], facts["layout"]) == ("finetune", 64, "timm")
    assert facts["architecture"]["dims"] == [4, 8, 8, 8]
    assert facts["architecture"]["classes"] == 3


def test_the_names_of_classes_are_those_of_the_head_that_is_written(tmp_path):
    source = tmp_path / "w.safetensors"
    write_weights(source, random_weights(CLASSIFIER), {"stage": "finetune", "classes": ["a", "b", "c"]})
    (tmp_path / "old.txt").write_text("a\nb\nc\n")
    (tmp_path / "new.json").write_text(json.dumps(["c", "d"]))
    found = {}
    for head, classes in (("keep", None), ("drop", None), ("map", (tmp_path / "old.txt", tmp_path / "new.json"))):
        convert(source, tmp_path / f"{head}.safetensors", "official", head=head, classes=classes)
        found[head] = read_facts(tmp_path / f"{head}.safetensors")
    assert found["keep"]["classes"] == ["a", "b", "c"]
    assert "classes" not in found["drop"]
    assert found["map"]["classes"] == ["c", "d"]
    assert {facts["stage"] for facts in found.values()} == {"finetune"}


def test_a_form_of_grn_that_others_would_compute_differently_is_refused(tmp_path):
    write_weights(tmp_path / "w.safetensors", random_weights(CLASSIFIER), {"model": {"grn_normaliser": "sum"}})
    with pytest.raises(
        CheckpointError, match=r"model\.grn_normaliser sum, which no other code computes \(theirs is mean"
    ):
        convert(tmp_path / "w.safetensors", tmp_path / "out.pt", "timm")
    assert not (tmp_path / "out.pt").exists()


def test_dropping_the_head(tmp_path):
    source = saved(tmp_path / "w.pt", random_weights(CLASSIFIER))
    done = convert(source, tmp_path / "d.pt", "official", head="drop")
    assert done.report.dropped == ("head.weight", "head.bias")
    assert "dropped: head.weight, head.bias" in str(done)
    assert load_weights(tmp_path / "d.pt").report.architecture == ConvNeXtArchitecture(
        CLASSIFIER.depths, CLASSIFIER.dims, norm=True
    )


def test_dropping_what_follows_the_encoder_of_fcmae(tmp_path):
    ours = random_weights(PRETRAINING)
    source = saved(tmp_path / "w.pt", ours)
    whole = convert(source, tmp_path / "whole.pt", "official")
    assert not whole.report.dropped
    assert_same(load_weights(tmp_path / "whole.pt").tensors, ours)
    done = convert(source, tmp_path / "d.pt", "official", head="drop")
    assert done.report.dropped == tuple(name for name in ours if not name.startswith("encoder."))
    encoder = {name.removeprefix("encoder."): t for name, t in ours.items() if name.startswith("encoder.")}
    assert_same(load_weights(tmp_path / "d.pt").tensors, encoder)
    timm = convert(source, tmp_path / "t.pt", "timm")
    assert timm.report.dropped == done.report.dropped
    assert_same(load_weights(tmp_path / "t.pt").tensors, encoder)


def test_mapping_the_head(tmp_path):
    ours = random_weights(CLASSIFIER)
    (tmp_path / "old.txt").write_text("a\nb\nc\n")
    (tmp_path / "new.json").write_text(json.dumps(["c", "d"]))
    classes = (tmp_path / "old.txt", tmp_path / "new.json")
    source = saved(tmp_path / "w.pt", ours)
    done = convert(source, tmp_path / "m.safetensors", "timm", head="map", classes=classes)
    assert "1 of 2 classes found by name" in str(done)
    head = load_weights(tmp_path / "m.safetensors").tensors["head.weight"]
    assert torch.equal(head[0], ours["head.weight"][2])
    assert not head[1].any()
    assert read_facts(tmp_path / "m.safetensors")["architecture"]["classes"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head": "map"}, "head is map without files of class names"),
        ({"classes": ("a", "b")}, "head is keep with files of class names"),
        ({"destination": "there.pt"}, "there.pt exists already"),
        ({"destination": "w.onnx"}, "w.onnx ends in none of .safetensors, .pt, .pth, .bin"),
        ({"destination": "w.pt/new.pt"}, "w.pt/new.pt cannot be written (Not a directory); give another path"),
        ({"entry": "ema"}, "no dictionary under 'ema'"),
    ],
)
def test_refusals(tmp_path, options, sentence):
    source = saved(tmp_path / "w.pt", random_weights(CLASSIFIER))
    (tmp_path / "there.pt").write_bytes(b"mine")
    destination = tmp_path / options.pop("destination", "new.pt")
    with pytest.raises(UserError) as caught:
        convert(source, destination, "official", **options)
    assert sentence in str(caught.value)
    assert not (tmp_path / "new.pt").exists()
    assert (tmp_path / "there.pt").read_bytes() == b"mine"


def test_the_command(tmp_path):
    source = saved(tmp_path / "w.pt", random_weights(CLASSIFIER))
    done = fcmae("convert", source, tmp_path / "t.safetensors", "--to", "timm")
    assert done.returncode == 0, done.stderr
    assert "official dense layout, a ConvNeXt V2 of depths (1, 1, 2, 1)" in done.stdout
    assert load_weights(tmp_path / "t.safetensors").report.layout == "timm"
    again = fcmae("convert", source, tmp_path / "t.safetensors", "--to", "timm")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "exists already" in again.stderr
