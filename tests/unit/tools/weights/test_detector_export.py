"""Models for detection through `fcmae export --format onnx`: what stands before each choice of boxes, equal outputs."""

import json

import onnx
import onnxruntime
import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.boxes import decode_boxes
from pipeline.models.region_proposals import propose
from pipeline.weights.safetensors_file import write_weights
from tests.unit.models.test_detector import FORMS, small_detector
from tests.unit.models.tiny_models import scatter_norms
from tools.weights.export import export

SIZE = (64, 96)


def run(path, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))


def test_a_part_that_exists_is_kept(tmp_path):
    model = small_detector("convnextv2", **FORMS["mask_rcnn"])
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    write_weights(tmp_path / "weights.safetensors", state, {"image_size": list(SIZE)})
    (tmp_path / "m-masks.onnx").write_text("another model's")
    with pytest.raises(CheckpointError, match=r"m-masks\.onnx exists already; name another file, or add --overwrite"):
        export(tmp_path / "weights.safetensors", tmp_path / "m.onnx", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "m-masks.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form"), [("convnextv2", "mask_rcnn"), ("slak", "cascade"), ("nextvit", "faster_rcnn")]
)
def test_the_exported_parts_and_nms_between_them_are_the_model(tmp_path, family, form):
    model = scatter_norms(small_detector(family, **FORMS[form], score_threshold=0.0)).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    write_weights(tmp_path / "weights.safetensors", state, {"image_size": list(SIZE), "classes": list("abcd")})
    done = export(tmp_path / "weights.safetensors", tmp_path / "m.onnx", "onnx")
    assert done.max_difference < 1e-4
    files = {"m.onnx", "m-regions.onnx", *(["m-masks.onnx"] if model.options.has_masks else [])}
    assert {path.name for path in done.files} == files
    told = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert (told["image_size"], told["classes"], told["strides"]) == ([64, 96], list("abcd"), list(model.strides))

    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    first = run(tmp_path / "m.onnx", images=images)
    sizes = torch.tensor([SIZE] * 3)
    with torch.no_grad():
        maps = model.pyramid(images)
        logits, deltas = model.rpn_head(maps)
        anchors = model.anchors(maps, maps[0])
        proposals = propose(logits, deltas, anchors, sizes, 40, 40, 0.7)
        found = model(images, sizes)
    assert told["level_sizes"] == [len(level) for level in anchors]
    torch.testing.assert_close(first["scores"], torch.cat(logits, 1).sigmoid(), rtol=0, atol=1e-5)
    boxes = decode_boxes(torch.cat(anchors), torch.cat(deltas, 1), (1, 1, 1, 1))
    torch.testing.assert_close(first["boxes"], boxes, rtol=1e-4, atol=1e-3)

    inputs = {name: first[name] for name in first if name.startswith("map") and name != f"map{len(maps) - 1}"}
    for image in range(3):  # the detections of an image are among the refined boxes of its proposals
        chosen = {"boxes": proposals.boxes[image], "image": torch.full((40,), image)}
        second = run(tmp_path / "m-regions.onnx", **inputs, **chosen)
        assert second["scores"].shape == (40, 4)
        best = found.boxes[image, 0], found.scores[image, 0], int(found.classes[image, 0])
        near = (second["refined"][:, best[2]] - best[0]).abs().amax(1) < 1e-2
        assert near.any()
        assert (second["scores"][near, best[2]] - best[1]).abs().min() < 1e-4
        if model.options.has_masks:
            chosen = {"boxes": found.boxes[image], "image": torch.full((20,), image)}
            masks = run(tmp_path / "m-masks.onnx", **inputs, **chosen)["mask_logits"]
            own = masks[torch.arange(20), found.classes[image]]
            valid = found.valid[image]
            torch.testing.assert_close(own[valid], found.mask_logits[image][valid], rtol=1e-3, atol=1e-4)
