"""SLaK and Next-ViT through `fcmae convert` and `fcmae export`: merged for ONNX, and equal through onnxruntime."""

import onnx
import onnxruntime
import pytest
import torch

from pipeline.checkpoint.loader import load_weights
from pipeline.checkpoint.weights import read_facts, write_weights
from pipeline.errors import CheckpointError
from pipeline.models import create_model
from tests.oracles import oracle
from tests.unit.checkpoint.test_families import MICRO, assert_same, build, ours
from tests.unit.models.tiny_models import scatter_norms
from tools.convert import convert
from tools.export import export

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def trained(family, **options):
    """Its norms are as if trained; its weights of a size that leaves something of the features."""
    model = scatter_norms(build(family, **options))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                generator = torch.Generator().manual_seed(number)
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "own"),
    [("slak", {"order": "sequential"}), ("nextvit", {"stem_stride": 2, "pooling": "2d", "activation": "gelu"})],
)
def test_onnx_of_own_forms_is_the_model_merged(tmp_path, family, own):
    model, source = trained(family, **own), tmp_path / "weights.safetensors"
    write_weights(source, ours(model), {"model": {"name": family, **MICRO[family], **own}, "image_size": 32})
    done = export(source, tmp_path / "m.onnx", "onnx")
    assert done.max_difference < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(IMAGES)
    assert expected.abs().max() > 0.01
    assert (torch.from_numpy(session.run(None, {"images": IMAGES.numpy()})[0]) - expected).abs().max() < 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators
    with pytest.raises(CheckpointError, match="which no other code computes"):
        convert(source, tmp_path / "o.pt", "official")
    export(source, tmp_path / "again.safetensors", "safetensors")
    assert_same(load_weights(tmp_path / "again.safetensors").tensors, ours(model))
    assert read_facts(tmp_path / "again.safetensors")["model"]["name"] == family


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
    torch.save(create_model("nextvit_small", 3).state_dict(), tmp_path / "w.pt")
    export(tmp_path / "w.pt", tmp_path / "folder", "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    with torch.no_grad():
        difference = loaded(IMAGES) - create_model("nextvit_small", 3).eval()(IMAGES)
    assert difference.abs().max() < 1e-5
