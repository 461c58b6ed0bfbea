"""Weights to start from: of a run, of this program, of the official code."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import create_model
from pipeline.weights.conversion import from_internal
from tests.fitted import write_fitted_run
from tests.support import make_tiny_run
from tools.own_images.starting_weights import starting_weights
from tools.weights.convert import architecture_of


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return write_fitted_run(tmp_path_factory.mktemp("fitted") / "run")


@pytest.mark.parametrize("place", ["", "finetune", "finetune/weights.safetensors"])
def test_a_run_a_stage_or_its_file(fitted, place):
    weights = starting_weights(str(fitted / place))
    assert weights.path == str(fitted / "finetune" / "weights.safetensors")
    assert weights.model["depths"] == [1, 2]
    assert weights.image_size == 24


def test_an_official_file_needs_its_published_model(tmp_path):
    model = create_model("convnextv2_atto", 0)
    encoder = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("norm.")}
    path = tmp_path / "convnextv2_atto_1k_224_fcmae.pt"
    torch.save({"model": from_internal(encoder, architecture_of(encoder), "official")[0]}, path)
    weights = starting_weights(str(path))
    assert weights.model == {"name": "convnextv2_atto", "stem_stride": 4}
    assert (weights.path, weights.image_size) == (str(path), None)


def test_other_shapes_are_named_by_depths_and_dims(tmp_path):
    model = create_model("convnextv2", 5, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    path = tmp_path / "small.pt"
    torch.save(from_internal(model.state_dict(), architecture_of(model.state_dict()), "official")[0], path)
    expected = {"name": "convnextv2", "depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "stem_stride": 4}
    assert starting_weights(str(path)).model == expected


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("convnextv2_tiny_1k_224_fcmae.pt", "download https://.*/pt_only/convnextv2_tiny_1k_224_fcmae.pt"),
        ("convnextv2_huge_22k_512_ema.pt", "download https://.*/im22k/convnextv2_huge_22k_512_ema.pt"),
        ("nowhere", "--from nowhere does not exist; name a run, a stage, a file of weights, or scratch"),
    ],
)
def test_missing_weights_name_where_to_get_them(place, words):
    with pytest.raises(UserError, match=words):
        starting_weights(place)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished stage"):
        starting_weights(str(make_tiny_run(tmp_path)))


def test_other_families_are_refused(tmp_path):
    model = create_model("slak", 3, depths=(1, 1), dims=(8, 8), kernel_sizes=(5, 5), small_kernel=3)
    path = tmp_path / "slak.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="is of a slak, and this command trains ConvNeXt V2"):
        starting_weights(str(path))
