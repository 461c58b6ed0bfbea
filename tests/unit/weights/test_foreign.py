"""Read files that are wrapped, damaged, mislabelled or of other programs; each error is one sentence."""

import argparse
import os
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import ConvNeXtArchitecture
from pipeline.weights.conversion import from_internal
from pipeline.weights.foreign import load_weights
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import assert_same, random_weights

MODEL = ConvNeXtArchitecture((1, 1, 1, 1), (4, 4, 8, 8), norm=True, classes=3)
TENSORS = {name: tensor.float() for name, tensor in random_weights(MODEL).items()}


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, **options)
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


WRAPPINGS = {
    "bare": (TENSORS, None, ()),
    "model": ({"model": TENSORS, "epoch": 3}, "model", ("epoch",)),
    "state_dict": ({"epoch": 3, "state_dict": TENSORS}, "state_dict", ("epoch",)),
    "ema alone": ({"model_ema": TENSORS}, "model_ema", ()),
    "official": (
        {"model": TENSORS, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1.0), "model_ema": {"x": 1}},
        "model",
        ("optimizer", "args", "model_ema"),
    ),
    "distributed": ({"model": {f"module.{name}": t for name, t in TENSORS.items()}}, "model", ()),
    "compiled": ({f"_orig_mod.module.{name}": t for name, t in TENSORS.items()}, None, ()),
    "parameters": ({name: torch.nn.Parameter(t) for name, t in TENSORS.items()}, None, ()),
    "timm": (from_internal(TENSORS, MODEL, "timm")[0], None, ()),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_pickles(tmp_path, wrapping, legacy):
    content, entry, ignored = WRAPPINGS[wrapping]
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=not legacy)
    tensors, report = load_weights(path)
    assert report.layout == ("timm" if wrapping == "timm" else "official dense")
    assert (report.entry, report.ignored, report.architecture) == (entry, ignored, MODEL)
    assert_same(tensors, TENSORS)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert "60 tensors read" in str(report)


def test_an_entry_may_be_named(tmp_path):
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    path = saved(tmp_path / "w.pt", {"model": TENSORS, "model_ema": other, "step": 4})
    assert_same(load_weights(path).tensors, TENSORS)
    loaded = load_weights(path, entry="model_ema")
    assert_same(loaded.tensors, other)
    assert loaded.report.ignored == ("model", "step")
    for entry in ("ema", "step"):
        assert f"no dictionary under '{entry}'; its keys are model, model_ema, step" in refusal(path, entry=entry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_in_their_own_precision(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    assert_same(load_weights(tmp_path / "w.safetensors").tensors, tensors)
    assert_same(load_weights(f"file://{tmp_path}/w.safetensors").tensors, tensors)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    """One safetensors file in 32 begins with the byte 0x80, as pickles do."""
    for extra in range(0, 256, 8):
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(TENSORS, path, {"padding": "x" * extra})
        if path.read_bytes()[0] == 0x80:
            assert_same(load_weights(path).tensors, TENSORS)
            return
    raise AssertionError("no padding leads to such a length")


def test_the_hash_is_that_of_write_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    digest = write_weights(path, TENSORS, {})
    assert_same(load_weights(path, expected_sha256=digest).tensors, TENSORS)
    assert "sha256 is" in refusal(path, expected_sha256="0" * 64)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap-was-run",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence = refusal(saved(tmp_path / "w.pt", {"model": TENSORS, "args": Trap()}))
    assert "holds a pickled posix.mkdir, which is no tensor and could run code" in sentence
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    assert "posix.mkdir" in refusal(tmp_path / "plain.pt") or "Unsupported" in refusal(tmp_path / "plain.pt")
    assert not (tmp_path / "trap-was-run").exists()


def with_one(name, value):
    return {**TENSORS, name: value}


FOREIGN = {
    "a model": (torch.nn.Linear(2, 2), "holds a pickled torch.nn.modules.linear.Linear"),
    "a list": ([1, 2], "holds a list and not a dictionary of tensors"),
    "a tensor": (torch.zeros(2), "holds a Tensor and not a dictionary"),
    "nothing": ({}, "there are no tensors in it"),
    "nothing inside": ({"model": {}}, "there are no tensors in it"),
    "numbers": ({"epoch": 3}, r"epoch is a int and not a named tensor (no weights under model"),
    "a number inside": ({"model": with_one("epoch", 3)}, "epoch is a int and not a named tensor; save"),
    "a numbered tensor": ({**TENSORS, 0: torch.zeros(2)}, "0 is a Tensor and not a named tensor"),
    "integers": (with_one("head.bias", torch.tensor([1, 2, 3])), "head.bias (3,) holds torch.int64"),
    "sparse": (with_one("head.bias", torch.ones(3).to_sparse()), "head.bias (3,) holds torch.float32 (torch.sp"),
    "no data": (with_one("head.bias", torch.empty(3, device="meta")), "head.bias (3,) holds torch.float32"),
    "NaN": (with_one("head.bias", torch.tensor([0, float("nan"), float("inf")])), "head.bias (3,) has 2 elements that"),
    "a ResNet": ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight (64, 3, 7, 7) belongs to no known layout"),
    "a ViT": (
        {"cls_token": torch.zeros(1, 1, 8), "norm.weight": torch.zeros(8), "head.bias": torch.zeros(2)},
        "cls_token (1, 1, 8) belongs to no known layout of ConvNeXt V2 (the nearest, official dense, has 2 of its 3",
    ),
    "another width": (with_one("norm.weight", torch.zeros(9)), "norm.weight is (9,) in the file but (8,) in a Con"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_content(tmp_path, content, sentence):
    assert sentence in refusal(saved(tmp_path / "w.pt", content))


def test_files_that_are_none(tmp_path):
    path = tmp_path / "w.pt"
    assert "w.pt does not exist; correct the path" in refusal(path)
    path.write_bytes(b"")
    assert "is empty" in refusal(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert "begins with '<!DOCTYPE html><html'" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "cannot be read (IsADirectoryError)" in refusal(path)


def test_a_label_must_be_true(tmp_path):
    saved(tmp_path / "w.safetensors", TENSORS)
    assert "PyTorch pickle file by its content and not safetensors; rename" in refusal(tmp_path / "w.safetensors")
    safetensors.torch.save_file(TENSORS, tmp_path / "w.pt")
    assert "safetensors file by its content and not PyTorch pickle; rename" in refusal(tmp_path / "w.pt")
    safetensors.torch.save_file(TENSORS, tmp_path / "w")  # a name without suffix is not mislabelled
    assert_same(load_weights(tmp_path / "w").tensors, TENSORS)


def test_a_header_that_promises_too_much(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_999) + b"{}")
    assert "cut short or damaged" in refusal(path)


KINDS = st.sampled_from(["zip", "legacy", "safetensors"])


def written(folder, kind):
    """A file of this kind, with TENSORS in it."""
    if kind == "safetensors":
        safetensors.torch.save_file(TENSORS, folder / "w.safetensors")
        return folder / "w.safetensors"
    return saved(folder / "w.pt", TENSORS, _use_new_zipfile_serialization=kind == "zip")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, data=st.data())
def test_a_cut_file_is_refused(tmp_path, kind, data):
    path = written(tmp_path, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refusal(path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, data=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, kind, data):
    """Safetensors and old pickles hold no checksums, so changed values of the right shape are not detected."""
    path = written(tmp_path, kind)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        tensors = load_weights(path).tensors
    except CheckpointError:
        refusal(path)
        return
    assert {name: tuple(t.shape) for name, t in tensors.items()} == MODEL.shapes()
    if kind == "zip":
        assert_same(tensors, TENSORS)


def test_a_changed_number_of_channels_is_refused(tmp_path):
    """No other tensor of a classifier has the stem's channels, and an old pickle has no checksum."""
    path = saved(tmp_path / "w.pt", TENSORS, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    place = content.index(b"(K\x04K\x03K\x04K\x04t") + 4  # the pickled size of the stem, (4, 3, 4, 4)
    for channels in (0, 1, 2, 4, 255):
        content[place] = channels
        path.write_bytes(content)
        sentence = refusal(path)
        assert channels not in (1, 2) or "downsample_layers.0.0.weight" in sentence


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("channels", [2, 4])
def test_weights_for_neither_grey_nor_colour_are_refused(tmp_path, channels, legacy):
    stem = torch.zeros(4, channels, 4, 4)
    path = saved(
        tmp_path / "w.pt", with_one("downsample_layers.0.0.weight", stem), _use_new_zipfile_serialization=not legacy
    )
    assert f"weights for images of {channels} channels; images have 3, or 1 if they are grey" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_elements_in_another_order_are_read(tmp_path, legacy):
    """A transposed matrix and a stem in channels-last order have other strides and no gaps."""
    orders = {4: lambda t: t.contiguous(memory_format=torch.channels_last), 2: lambda t: t.t().contiguous().t()}
    changed = {name: orders.get(tensor.ndim, lambda t: t)(tensor) for name, tensor in TENSORS.items()}
    path = saved(tmp_path / "w.pt", changed, _use_new_zipfile_serialization=not legacy)
    assert_same(load_weights(path).tensors, TENSORS)
