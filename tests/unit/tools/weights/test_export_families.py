"""SLaK and Next-ViT through `fcmae convert` and `fcmae export`: folded for ONNX, with equal outputs in onnxruntime."""

import onnx
import onnxruntime
import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.weights.foreign import load_weights
from pipeline.weights.safetensors_file import read_facts, write_weights
from tests.oracles import as_if_trained, assert_equal_outputs, different_images, oracle
from tests.unit.weights.test_other_families import MICRO, assert_same, build, ours
from tools.weights.convert import convert
from tools.weights.export import export

IMAGES = different_images(3, 32, torch.float32)
WIDE = IMAGES[:, :, :24].contiguous()  # 24 x 32
STAGES = {"depths": (1, 2, 2), "dims": (12, 24, 48), "pattern": "CHH"}  # attention of the second one pools


def trained(family, images=IMAGES, **options):
    return as_if_trained(build(family, **options), images)


def onnx_outputs(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("slak", {"order": "sequential"}),
        ("nextvit", {**STAGES, "stem_stride": 2, "pooling": "2d", "activation": "gelu"}),
    ],
)
def test_onnx_of_own_forms_is_the_model_merged(tmp_path, family, own):
    model, source = trained(family, WIDE, **own), tmp_path / "weights.safetensors"
    facts = {"model": {"name": family, **MICRO[family], **own}, "image_size": [24, 32]}
    write_weights(source, ours(model), facts)
    done = export(source, tmp_path / "m.onnx", "onnx")
    assert done.max_difference < 1e-5
    with torch.no_grad():
        assert_equal_outputs(onnx_outputs(tmp_path / "m.onnx", WIDE), model(WIDE), 1e-5)
    assert "Conv" in operators(tmp_path / "m.onnx")
    assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="which no other code computes"):
        convert(source, tmp_path / "o.pt", "official")
    export(source, tmp_path / "again.safetensors", "safetensors")
    assert_same(load_weights(tmp_path / "again.safetensors").tensors, ours(model))
    assert read_facts(tmp_path / "again.safetensors")["model"]["name"] == family


RELEASED = {
    "slak": {"stem_stride": 4},
    # 1-D pooling and ReLU; at 80 pixels the averages run over the ends of rows and leave tokens out
    "nextvit": {"depths": (1, 2, 2, 2), "dims": (12, 24, 48, 96), "pattern": "CHHH"},
}


@pytest.mark.parametrize("family", ["slak", pytest.param("nextvit", marks=pytest.mark.slow)])
def test_onnx_of_the_released_forms_is_the_model_merged(tmp_path, family):
    """From a small checkpoint without facts, such as the released ones."""
    images = different_images(3, 80, torch.float32)
    model = trained(family, images, **RELEASED[family])
    torch.save({"model": model.state_dict()}, tmp_path / "w.pt")
    done = export(tmp_path / "w.pt", tmp_path / "m.onnx", "onnx", image_size=80)
    assert done.max_difference < 1e-5
    with torch.no_grad():
        assert_equal_outputs(onnx_outputs(tmp_path / "m.onnx", images), model(images), 1e-5)
    assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
    if family == "nextvit":
        assert "Relu" in operators(tmp_path / "m.onnx")
        assert model.features[2].e_mhsa.pooling == "1d"
        assert model.features[2].e_mhsa.reduction == 4


def test_conversion_keeps_or_drops_the_head(tmp_path):
    model = trained("nextvit")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "official.pt", "official")
    counters = {name: tensor for name, tensor in model.state_dict().items() if name not in ours(model)}
    assert_same(torch.load(tmp_path / "official.pt")["model"], model.state_dict())
    assert counters
    done = convert(tmp_path / "w.pt", tmp_path / "bare.safetensors", "official", head="drop")
    assert {"proj_head.0.weight", "proj_head.0.bias"} <= set(done.report.dropped)
    assert load_weights(tmp_path / "bare.safetensors").report.architecture.classes == 0


def test_a_mapped_head_has_the_rows_of_its_classes(tmp_path):
    model = trained("nextvit")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    (tmp_path / "old.txt").write_text("cat\ndog\nowl\n")
    (tmp_path / "new.txt").write_text("owl\ncat\n")
    convert(
        tmp_path / "w.pt", tmp_path / "m.pt", "official", head="map",
        classes=(tmp_path / "old.txt", tmp_path / "new.txt"),
    )  # fmt: skip
    mapped = load_weights(tmp_path / "m.pt").tensors["proj_head.0.weight"]
    assert torch.equal(mapped, model.proj_head[0].weight[[2, 0]])


def test_timm_loads_the_folder(tmp_path):
    timm = oracle("timm", always_in_ci=True)
    images = different_images(2, 64, torch.float32)  # at 32 pixels attention would have a single key
    model = as_if_trained(create_model("nextvit_small", 3), images)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    export(tmp_path / "w.pt", tmp_path / "folder", "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images = images.double()  # fp32 weights; in fp32 the two round in other places
    with torch.no_grad():
        assert_equal_outputs(loaded.double()(images), model.double()(images), 1e-12)
