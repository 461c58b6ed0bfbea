import json

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import oracle
from tools.analyze.analyzed_model import open_model

FORM = {"name": "convnextv2", "depths": [1, 2], "dims": [8, 16], "stem_stride": 2, "grn_aggregation": "l1"}
OPTIONS = "depths=[1,2] dims=[8,16] stem_stride=2"


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    model = create_model(**FORM, num_classes=4, seed=7).eval()
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_a_file_of_ours_has_its_form_of_grn(tmp_path, model, images):
    write_weights(tmp_path / "w.safetensors", model.state_dict(), {"model": FORM, "classes": list("wxyz")})
    found = open_model(f"{tmp_path}/w.safetensors label='with GRN'", 16)
    assert torch.equal(found.network(images), model(images))
    assert (found.label, found.classes) == ("with GRN", ("w", "x", "y", "z"))


@torch.no_grad()
def test_other_layouts_come_through_the_loader(tmp_path, images):
    model = create_model("convnextv2", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=4).eval()
    torch.save({"model_ema": model.state_dict()}, tmp_path / "official.pth")
    found = open_model(f"{tmp_path}/official.pth entry=model_ema", 32)
    images = images.repeat(1, 1, 2, 2)
    assert torch.equal(found.network(images), model(images))


@torch.no_grad()
def test_of_pre_training_the_encoder_is_taken(tmp_path, images):
    encoder = create_model(**FORM, num_classes=0)
    weights = FCMAE(encoder, decoder_dim=8).state_dict()
    write_weights(tmp_path / "w.safetensors", weights, {"model": FORM})
    assert torch.equal(open_model(f"{tmp_path}/w.safetensors", 16).network(images), encoder.eval()(images))


def test_a_run_gives_its_last_finished_stage_and_the_hash_is_compared(tmp_path, model):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "recipe.yaml").write_text("stages: {pretrain: {}, finetune: {}, more: {}}")
    with pytest.raises(UserError, match="no finished stage"):
        open_model(str(run), 16)
    for stage in ("pretrain", "finetune"):
        (run / stage).mkdir()
        sha256 = write_weights(run / stage / "weights.safetensors", model.state_dict(), {"model": FORM, "stage": stage})
        done = {"weights": "weights.safetensors", "weights_sha256": sha256, "step": 3}
        (run / stage / "DONE").write_text(json.dumps(done))
    assert open_model(str(run), 16).label == "mine/finetune"
    assert open_model(str(run / "pretrain"), 16).label == "mine/pretrain"
    write_weights(run / "finetune/weights.safetensors", model.state_dict(), {"model": FORM, "stage": "other"})
    with pytest.raises(UserError, match="sha256"):
        open_model(str(run), 16)


def test_random_weights_are_said_to_be_and_gain_keeps_the_variance():
    plain, wide = open_model(f"convnextv2 {OPTIONS}", 16), open_model(f"convnextv2 {OPTIONS} gain=1 label=wide", 16)
    assert (plain.weights, wide.weights) == ("random weights", "random weights (gain 1)")
    weight = wide.network.stages[1][0].pwconv2.weight
    assert weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert torch.equal(weight, open_model(f"convnextv2 {OPTIONS} gain=1", 16).network.stages[1][0].pwconv2.weight)


def test_timms_models_are_built_for_the_image_size():
    oracle("timm", always_in_ci=True)
    found = open_model("timm:vit_tiny_patch16_224 num_classes=3 label=ViT", 32)
    assert found.network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert (found.label, found.weights) == ("ViT", "random weights")
    assert found.mean == pytest.approx((127.5,) * 3)


@torch.no_grad()
def test_timms_models_take_weights_from_a_file(tmp_path):
    timm = oracle("timm", always_in_ci=True)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in model.state_dict().items() if t.ndim}}, tmp_path / "r.pt"
    )
    found = open_model(f"timm:resnet10t num_classes=3 weights={tmp_path}/r.pt", 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.network(images), model(images))
    for words, sentence in (
        ("resnet10t num_classes=4", "size mismatch for fc"),
        ("resnet18 num_classes=3", "lacks"),
    ):
        with pytest.raises(UserError, match=sentence) as raised:
            open_model(f"timm:{words} weights={tmp_path}/r.pt", 32)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "there is no model ''"),
        ("convnextv2_atom", "choose one of convnextv2_atto"),
        ("convnextv2_atto width=2", "width"),
        ("convnextv2_atto tiny", "its words after the first are not all KEY=VALUE"),
        ("convnextv2_atto label='x", "its words after the first are not all KEY=VALUE"),
        ("convnextv2_atto depths=[1", "its words after the first are not all KEY=VALUE"),
        ("convnextv2_atto gain=much", "could not convert"),
        ("missing.safetensors", "missing.safetensors does not exist"),
        ("missing.safetensors depths=[1]", "depths does not go with weights"),
        ("timm:resnet17", "timm cannot make the model resnet17"),
    ],
)
def test_what_does_not_exist_is_one_sentence(words, sentence):
    if words.startswith("timm:"):
        oracle("timm", always_in_ci=True)
    with pytest.raises(UserError, match=sentence) as raised:
        open_model(words, 32)
    assert "\n" not in str(raised.value)
