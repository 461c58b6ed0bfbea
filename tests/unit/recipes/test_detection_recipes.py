"""The recipes of COCO make the published models: parameters and multiply-adds are those that the sources print."""

import pytest
import torch

from pipeline.recipe import load_recipe
from tests.unit.recipes.multiply_adds import count_macs, meta_model
from tests.unit.recipes.published_values import TASK_TABLES, chain
from tools.recipes.library import find_recipe

DETECTION = TASK_TABLES["detection"]
# bytedance/Next-ViT counted the classifier of 1000 classes too, which a later commit removed from the detector, and of
# all parameters those alone that are trained, as mmcv does.
NEXTVIT_HEAD = 1024 * 1000 + 1000
SIZE = 800, 1280  # of the image that multiply-adds are printed for
QUICK = ("v1-tiny-mask-rcnn", "v1-tiny-cascade", "nextvit-small-1x")  # the others take seconds each


def _printed():
    """The recipes whose multiply-adds are printed, which are not SLaK's."""
    for name, row in DETECTION["recipes"].items():
        if row["published"][3]:
            yield pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", list(_printed()))
def test_parameters_and_multiply_adds_are_the_printed_ones(name):
    _, _, printed_parameters, printed_macs, _ = DETECTION["recipes"][name]["published"]
    model = meta_model(chain(f"detection/{name}").stages["detect"])
    macs = count_macs(model, torch.empty(1, 3, *SIZE, device="meta"), torch.tensor([SIZE], device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert macs / 1e9 == pytest.approx(float(printed_macs.removesuffix("G")), abs=1.05)
    if printed_parameters:
        number = printed_parameters.removesuffix("M")
        millions = (parameters + (NEXTVIT_HEAD if name.startswith("nextvit") else 0)) / 1e6
        assert millions == pytest.approx(float(number), abs=0.06 if "." in number else 0.5)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_supervised_start_is_trained_on_imagenet(size):
    before = chain(f"convnextv2/{size}-supervised").stages["supervised"]
    found = chain(f"detection/v2-{size}-supervised").stages
    assert found["supervised"].fingerprint() == before.fingerprint()
    assert found["supervised"].data == before.data
    assert found["detect"].data.train.endswith("coco-train.beton")


@pytest.mark.parametrize(
    ("name", "by_micro_slots"),
    [
        ("v2-base", {1: [1, 2, 4, 8], 2: [1, 2, 4], 8: [1]}),
        ("v1-tiny-cascade", {1: [8], 2: [4], 4: [2], 8: [1]}),
        ("nextvit-small-3x", {1: [1, 2, 4, 8], 4: [1, 2]}),
    ],
)
def test_numbers_of_ranks_that_keep_slots_and_norm_groups_whole(name, by_micro_slots):
    for slots, fits in by_micro_slots.items():
        recipe = load_recipe(find_recipe(f"detection/{name}"), [f"stages.detect.batch.micro_slots={slots}"])
        assert recipe.stages["detect"].world_sizes() == fits


def test_own_annotations_train_on_one_gpu_with_any_micro_batch():
    for slots in (1, 2, 4, 8):
        recipe = load_recipe(find_recipe("detect-own"), [f"stages.detect.batch.micro_slots={slots}"])
        assert 1 in recipe.stages["detect"].world_sizes()
