import builtins
import functools
import json
import math

import onnx
import onnxruntime
import pytest
import torch

from pipeline.errors import CheckpointError, UserError
from pipeline.models import create_model
from pipeline.weights.architecture import ConvNeXtArchitecture
from pipeline.weights.foreign import load_weights
from pipeline.weights.safetensors_file import read_facts, write_weights
from tests.oracles import assert_equal_outputs, oracle, random_weights
from tests.support import fcmae
from tools.weights import export as tool
from tools.weights.export import export, relative_difference
from tools.weights.model import build_model

CLASSIFIER = ConvNeXtArchitecture((1, 1, 2, 1), (4, 8, 8, 8), norm=True, classes=3)
PRETRAINING = ConvNeXtArchitecture((1, 1, 2, 1), (4, 8, 8, 8), decoder=(8, 1))
TINY = ConvNeXtArchitecture((1, 1), (4, 8), decoder=(8, 1))
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@functools.cache
def weights(architecture):
    return {name: tensor.float() for name, tensor in random_weights(architecture).items()}


def saved(path, architecture):
    torch.save(weights(architecture), path)
    return path


@torch.no_grad()
def outputs(architecture):
    """The outputs for IMAGES of the classifier, or of FCMAE's encoder."""
    tensors = weights(architecture)
    if architecture.decoder:
        tensors = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    model = create_model("convnextv2", **architecture.model_options)
    model.load_state_dict(tensors)
    return model(IMAGES)


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier's ONNX file, shared because tracing takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    done = export(saved(folder / "w.pt", CLASSIFIER), folder / "m.onnx", "onnx", image_size=64)
    assert "largest difference from PyTorch: " in str(done)
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "w.pt"]
    return folder / "m.onnx", done


def test_build_is_the_model():
    assert torch.equal(build_model(weights(CLASSIFIER))(IMAGES), outputs(CLASSIFIER))


@pytest.mark.parametrize("architecture", [CLASSIFIER, PRETRAINING])
def test_safetensors_depends_on_the_content_alone(tmp_path, architecture):
    source = saved(tmp_path / "w.pt", architecture)
    reversed_source = tmp_path / "elsewhere.pt"
    torch.save({"model": dict(reversed(weights(architecture).items()))}, reversed_source)
    for number, path in enumerate((source, reversed_source)):
        export(path, tmp_path / f"{number}.safetensors", "safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    content = (tmp_path / "0.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ["fcmae"]
    facts = read_facts(tmp_path / "0.safetensors")
    assert header["__metadata__"]["fcmae"] == json.dumps(facts, sort_keys=True, separators=(",", ":"))
    assert str(tmp_path) not in header["__metadata__"]["fcmae"]
    assert load_weights(tmp_path / "0.safetensors").report.architecture == architecture


def test_onnx_gives_the_same_logits_at_any_batch(exported):
    path, done = exported
    assert 0 <= done.max_difference < 1e-5
    expected, session = outputs(CLASSIFIER), session_of(path)
    found = [session.run(["logits"], {"images": IMAGES[:count].numpy()})[0] for count in (1, 2, 3)]
    assert [logits.shape for logits in found] == [(1, 3), (2, 3), (3, 3)]
    everything = torch.cat([expected[:count] for count in (1, 2, 3)])
    assert_equal_outputs(torch.cat(list(map(torch.from_numpy, found))), everything, 1e-5)


def test_onnx_of_an_encoder_with_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ONE_FILE_BYTES", 1000)
    done = export(saved(tmp_path / "w.pt", TINY), tmp_path / "m.onnx", "onnx", image_size=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "w.pt"]
    assert sorted(path.name for path in done.files) == ["m.onnx", "m.onnx.data"]
    assert done.report.dropped[0] == "mask_token"
    found = torch.from_numpy(session_of(tmp_path / "m.onnx").run(["features"], {"images": IMAGES.numpy()})[0])
    assert_equal_outputs(found, outputs(TINY), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_onnx_file_that_differs_is_not_written(tmp_path, monkeypatch, exported, scale):
    """The tolerance is relative to the outputs, which are tiny in some untrained models."""
    head = {name: scale * tensor for name, tensor in weights(CLASSIFIER).items() if name.startswith("head.")}
    right = onnx.load(exported[0])
    for tensor in right.graph.initializer:
        if tensor.name in head:
            tensor.CopyFrom(onnx.numpy_helper.from_array(head.pop(tensor.name).numpy(), tensor.name))
    assert not head
    bias = scale * (weights(CLASSIFIER)["head.bias"] + 0.01)
    weight = scale * weights(CLASSIFIER)["head.weight"]
    torch.save({**weights(CLASSIFIER), "head.weight": weight, "head.bias": bias}, tmp_path / "w.pt")
    monkeypatch.setattr(tool, "write_onnx", lambda model, path, *_, **__: onnx.save(right, path))
    share = r"differs from the model by [3-9]\.\d\de-03 of its largest output at batch 1, more than 1e-04"
    with pytest.raises(UserError, match=share):
        export(tmp_path / "w.pt", tmp_path / "m.onnx", "onnx", image_size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [([0, 2], [0, 1], 0.5), ([0, 0], [0, 0], 0), ([0, 0], [0, 1e-9], math.inf), ([1], [1, 1], math.inf)],
)
def test_a_difference_is_a_share_of_the_largest_output(ours, theirs, share):
    assert relative_difference(torch.tensor(ours), torch.tensor(theirs)) == share


def test_an_onnx_file_of_one_batch_alone_is_not_written(tmp_path, monkeypatch):
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, dynamic_shapes, **options: real(*a, **options))
    with pytest.raises(UserError, match=r"onnxruntime cannot run the exported model at batch 1 \(.*\), so nothing"):
        export(saved(tmp_path / "w.pt", TINY), tmp_path / "m.onnx", "onnx", image_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"needs the package onnxruntime, .* pip install 'fcmae\[onnx\]'"):
        export(saved(tmp_path / "w.pt", CLASSIFIER), tmp_path / "m.onnx", "onnx")


@pytest.mark.parametrize(
    ("architecture", "name", "options"),
    [
        (CLASSIFIER, "convnextv2_tiny", {"depths": (1, 1, 2, 1), "dims": (4, 8, 8, 8)}),
        (PRETRAINING, "convnextv2_tiny", {"depths": (1, 1, 2, 1), "dims": (4, 8, 8, 8)}),
        (ConvNeXtArchitecture((2, 2, 6, 2), (40, 80, 160, 320), norm=True, classes=5), "convnextv2_atto", {}),
    ],
    ids=["classifier", "fcmae", "atto"],
)
def test_timm_loads_the_folder(tmp_path, architecture, name, options):
    timm = oracle("timm", always_in_ci=True)
    folder = tmp_path / "timm"
    done = export(saved(tmp_path / "w.pt", architecture), folder, "timm", image_size=64)
    path, classes = folder / "model.safetensors", architecture.classes
    model = timm.create_model(name, num_classes=classes, checkpoint_path=str(path), **options).eval()
    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert ("added: head.norm.weight (ones)" in str(done)) == bool(architecture.decoder)
    expected = outputs(architecture)
    with torch.no_grad():
        for theirs in (model, local):
            found = theirs(IMAGES) if classes else theirs.forward_features(IMAGES)
            assert_equal_outputs(found, expected, 1e-5)
    assert tuple(local.pretrained_cfg["input_size"]) == (3, 64, 64)
    assert tuple(local.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)


def test_an_exported_file_says_how_its_images_are_normalised(tmp_path, exported):
    """By ImageNet's numbers, or by those that the weights were trained with."""

    def described(path):
        return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}

    plain = {"in_channels": 3, "image_size": [64, 64], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert described(exported[0]) == plain
    facts = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "image_size": [32, 64], "classes": ["a", "b", "c"]}
    write_weights(tmp_path / "w.safetensors", weights(CLASSIFIER), facts)
    export(tmp_path / "w.safetensors", tmp_path / "m.onnx", "onnx")
    assert described(tmp_path / "m.onnx") == {"in_channels": 3, **facts}
    export(tmp_path / "w.safetensors", tmp_path / "timm", "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == (facts["mean"], facts["std"])
    assert config["input_size"] == [3, 32, 64]
    export(tmp_path / "w.safetensors", tmp_path / "copy.safetensors", "safetensors")
    assert read_facts(tmp_path / "copy.safetensors")["mean"] == facts["mean"]


@pytest.mark.parametrize(
    ("destination", "kind", "options", "sentence"),
    [
        ("m.pt", "onnx", {}, "m.pt ends in none of .onnx"),
        ("there.onnx", "onnx", {}, "there.onnx exists already"),
        ("m.bin", "safetensors", {}, "m.bin ends in none of .safetensors"),
        ("m.onnx", "onnx", {"image_size": 16}, "image_size is 16 pixels, less than the model's stride of 32"),
        ("there.onnx", "timm", {}, "there.onnx exists already"),
        ("full", "timm", {}, "full exists already"),
        *(
            (f"w.pt/m{suffix}", kind, {}, "cannot be written (Not a directory)")
            for suffix, kind in ((".safetensors", "safetensors"), (".onnx", "onnx"), ("", "timm"))
        ),
    ],
)
def test_refusals(tmp_path, destination, kind, options, sentence):
    source = saved(tmp_path / "w.pt", CLASSIFIER)
    (tmp_path / "there.onnx").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"mine")
    with pytest.raises(UserError) as caught:
        export(source, tmp_path / destination, kind, **options)
    assert sentence in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there.onnx", "w.pt"]


def test_shapes_that_timm_has_not(tmp_path):
    source = saved(tmp_path / "w.pt", ConvNeXtArchitecture((1, 1), (4, 8), norm=True, classes=3))
    with pytest.raises(CheckpointError, match="timm builds ConvNeXts of 4 stages"):
        export(source, tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


def test_the_command(tmp_path):
    source = saved(tmp_path / "w.pt", CLASSIFIER)
    done = fcmae("export", source, tmp_path / "timm", "--format", "timm", "--image-size", 32)
    assert done.returncode == 0, done.stderr
    assert "config.json is ready" in done.stdout
    failed = fcmae("export", tmp_path / "nowhere.pt", tmp_path / "x.safetensors")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
