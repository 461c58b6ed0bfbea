"""Weights for images of one channel and of three: adapted when asked for, else refused in one sentence."""

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.weights.input_channels import adapt_channels, input_channels, match_channels
from pipeline.weights.safetensors_file import read_facts, write_weights
from tests.unit.models.tiny_models import scatter_weights, tiny_fcmae
from tests.unit.weights.test_other_families import MICRO
from tools.predict.image_model import load_image_model
from tools.weights.convert import convert
from tools.weights.model import open_weights

FAMILIES = {"convnextv2": {"depths": (1, 1), "dims": (4, 6)}, "slak": MICRO["slak"], "nextvit": MICRO["nextvit"]}


def network(family, channels, classes=3):
    return scatter_weights(create_model(family, classes, in_channels=channels, **FAMILIES[family])).eval()


def fill(model, tensors):
    model.load_state_dict({**model.state_dict(), **tensors})
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("how", "given", "channels"), [("sum", 3, 1), ("repeat", 1, 3)])
@torch.no_grad()
def test_a_grey_image_has_the_same_logits_before_and_after(family, how, given, channels):
    before = network(family, given)
    after = fill(network(family, channels), adapt_channels(before.state_dict(), how))
    grey = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    expected, found = (model(grey.expand(-1, count, -1, -1)) for model, count in ((before, given), (after, channels)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_decoder_predicts_one_channel_or_three_alike():
    mask = torch.arange(8).view(1, 8) % 2 == 0
    grey = torch.randn(1, 1, 16, 32, dtype=torch.float64)
    before = scatter_weights(tiny_fcmae(in_channels=1))
    after = fill(tiny_fcmae(in_channels=3).double(), adapt_channels(before.state_dict(), "repeat"))
    one, three = before(grey, mask).prediction, after(grey.expand(-1, 3, -1, -1), mask).prediction
    assert (one.shape[1], three.shape[1]) == (64, 192)
    torch.testing.assert_close(three, one.repeat_interleave(3, 1), rtol=1e-12, atol=1e-12)
    again = fill(tiny_fcmae(in_channels=1).double(), adapt_channels(after.state_dict(), "sum"))
    torch.testing.assert_close(again(grey, mask).prediction, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "channels", "how", "sentence"),
    [
        (
            1,
            3,
            None,
            "w has weights for images of 1 channel, and the model takes 3; adapt them by init.channels repeat",
        ),
        (
            3,
            1,
            None,
            "images of 3 channels, and the model takes 1; adapt them by init.channels sum, or use a model of 3",
        ),
        (3, 1, "repeat", "adapt them by init.channels sum"),
        (4, 3, "sum", "w has weights for images of 4 channels; images have 3, or 1 if they are grey"),
    ],
)
def test_other_channels_are_one_sentence(given, channels, how, sentence):
    tensors = network("convnextv2", given).state_dict()
    with pytest.raises(CheckpointError) as error:
        match_channels(tensors, channels, how, "w")
    assert sentence in str(error.value)


def test_equal_channels_are_left_alone():
    tensors = network("convnextv2", 1).state_dict()
    assert all(tensors[n] is t for n, t in match_channels(tensors, 1, "sum", "").items())
    assert input_channels({"head.weight": torch.zeros(2, 2)}) is None


def test_evaluation_takes_grey_weights_and_adapts_on_request(tmp_path):
    path = tmp_path / "grey.pt"
    torch.save(network("convnextv2", 1).float().state_dict(), path)
    grey = load_image_model(path, image_size=16)
    assert (grey.network.in_channels, grey.transform.statistics.mean) == (1, (0.449,))
    assert load_image_model(path, image_size=16, channels="repeat").network.in_channels == 3
    with pytest.raises(CheckpointError, match=r"grey.pt: the weights are for images of 1 channel, and to sum them"):
        load_image_model(path, channels="sum")
    torch.save(network("convnextv2", 4).float().state_dict(), path)
    with pytest.raises(CheckpointError, match="has weights for images of 4 channels; images have 3, or 1 if they are"):
        load_image_model(path)
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)
    assert grey.predict(image)[0][0].confidence > 0


def test_converted_weights_and_their_facts_are_adapted_together(tmp_path):
    source, target = tmp_path / "w.safetensors", tmp_path / "grey.safetensors"
    model = {"name": "convnextv2", "depths": [1, 1], "dims": [4, 6]}
    facts = {"model": model, "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.2, 0.2]}
    write_weights(source, network("convnextv2", 3).state_dict(), facts)
    convert(source, target, "official", channels="sum")
    written = read_facts(target)
    assert (written["model"]["in_channels"], written["mean"], written["std"]) == (1, [0.4], [0.2])
    assert input_channels(open_weights(str(target)).tensors) == 1
    assert load_image_model(target, image_size=16).transform.statistics.mean == (0.4,)
    loaded = load_image_model(source, image_size=16, channels="sum")
    assert (loaded.network.in_channels, loaded.transform.statistics.mean) == (1, (0.4,))
    with pytest.raises(CheckpointError, match="needs 1; leave channels out"):
        convert(source, tmp_path / "other.safetensors", "timm", channels="repeat")
    assert not (tmp_path / "other.safetensors").exists()


def test_an_fcmae_of_grey_images_has_one_channel_in_every_cell():
    assert FCMAE(create_model("convnextv2", 0, in_channels=1, **FAMILIES["convnextv2"])).pred.out_channels == 64
