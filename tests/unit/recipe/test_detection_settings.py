"""Detection stages: which recipes are refused, over which images their norms count, and the gate they get."""

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import StageRecipe
from pipeline.recipe.yaml_files import expand_stages, parse_settings

SMALL = {
    "previous": "pretrain",
    "objective": {"kind": "detection", "classes": 3},
    "model": {"name": "convnextv2", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "data": {"train": "train.beton", "image_size": 64, "views": {}},
    "batch": {"global_batch": 16, "slot": 2},
    "optimizer": {"lr": 1e-3},
    "schedule": {"epochs": 12.0, "decay": "step", "milestones": [8, 11]},
}
NEXT_VIT = {"name": "nextvit_small", "depths": None, "dims": None}


def stage(**changes) -> StageRecipe:
    raw = {**SMALL, **{n: None if new is None else {**SMALL.get(n, {}), **new} for n, new in changes.items()}}
    return parse_settings(StageRecipe, raw, "it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"views": None}}, r"data.views is missing, .* set data.views: \{\}"),
        ({"data": {"scenes": {}}}, "data.scenes is for the objective segmentation and objective.kind is detection"),
        ({"objective": {"kind": "classification"}}, "data.views is for the objective detection and objective.kind is"),
        ({"data": {"image_size": 80}}, "image_size 80 .* must be a multiple of the model's stride, 32 pixels"),
        ({"data": {"rand_augment": "rand-m9-mstd0.5-inc1"}}, "rand_augment is .*, which detection does not use"),
        ({"data": {"views": {"scale": [2.0, 0.1]}}}, "write the smaller number first"),
        ({"data": {"views": {"crop": [600, 384]}}}, "write the smaller number first"),
        ({"data": {"views": {"test_size": [800, 1333]}}}, r"short side first; write \[1333, 800\]"),
        ({"data": {"views": {"short_sides": []}}}, "0 short sides are given"),
        ({"data": {"views": {"kind": "multi_scale", "longest": 799}}}, "longest 799 is less than 800 of short_sides"),
        ({"data": {"views": {"kind": "mosaic"}}}, "data.views.kind.*mosaic"),
        ({"model": {"depths": [1], "dims": [8]}}, "needs the maps of two or more"),
        ({"objective": {"frozen_stages": 5}}, "frozen_stages is 5 but the model has 4 stages"),
        ({"objective": {"frozen_norms": True}}, "freezes BatchNorms, and this convnextv2 has none"),
        ({"objective": {"masks": False}}, "head mask_rcnn always has a mask head; set head to faster_rcnn"),
        ({"objective": {"region_norm": "batch"}}, "head mask_rcnn has none; set it to none"),
        ({"objective": {"regions": 3}}, r"regions 3 \* positive_share 0.25 is less than 1"),
        ({"objective": {"anchors_sampled": 1}}, "anchors_sampled is 1"),
        (
            {"objective": {"frozen_stages": 1}, "init": {"start": "scratch"}},
            "is 1 but the stage starts with new weights",
        ),
        ({"objective": {"frozen_stages": 1}, "previous": None}, "starts with new weights, .* name weights in init"),
        (
            {"objective": {"frozen_norms": True}, "model": NEXT_VIT, "init": {"start": "scratch"}},
            "frozen_norms is true but the stage starts with new weights, .* or freeze nothing",
        ),
        (
            {"objective": {"frozen_norms": True, "map_norms": True}, "model": NEXT_VIT},
            "map_norms is true, which makes new BatchNorms, and frozen_norms is true",
        ),
        (
            {"data": {"views": {"boxes_from_masks": True}}, "objective": {"head": "faster_rcnn"}},
            "boxes_from_masks is true but objective.head is faster_rcnn; set it to false",
        ),
        (
            {"gate": {"metric": "mask_ap", "at_least": 1.0}, "objective": {"head": "cascade", "masks": False}},
            "gate.metric is mask_ap but objective.masks is false; choose box_ap",
        ),
        (
            {"objective": {"head": "cascade", "region_norm": "batch", "norm_group": 6}},
            "norm_group 6 must divide batch.global_batch 16 .*, or set objective.region_norm to group",
        ),
        ({"gate": {"metric": "miou", "at_least": 1.0}}, "gate.metric is miou; detection is judged by box_ap or mask"),
        ({"gate": {"metric": "mask_ap", "at_least": 1.0}, "objective": {"head": "faster_rcnn"}}, "faster_rcnn; choose"),
        ({"init": {"head": "map"}}, "init.head is map"),
        ({"schedule": {"milestones": []}}, "decay step needs milestones"),
        ({"schedule": {"decay": "cosine"}}, r"milestones \[8, 11\] and decay cosine do not go together"),
        ({"schedule": {"milestones": [11, 8]}}, "must increase"),
        ({"schedule": {"milestones": [8, 8]}}, "must increase"),
        ({"schedule": {"milestones": [8, 12]}}, "must be less than epochs 12, the stage's length"),
        ({"schedule": {"epochs": None, "steps": 10}}, "must be less than steps 10, the stage's length"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(changes, message):
    with pytest.raises(RecipeError, match=message) as error:
        stage(**changes)
    assert "\n" not in str(error.value)


def test_a_norm_group_counts_where_batchnorms_are_trained():
    cascade = {"head": "cascade", "norm_group": 8}
    assert stage(objective=cascade).norm_group_images is None
    assert stage(objective={**cascade, "region_norm": "batch"}).norm_group_images == 8
    assert stage(objective={**cascade, "region_norm": "batch"}).world_sizes() == [4, 8]
    assert stage(model=NEXT_VIT).norm_group_images == 16
    frozen = stage(model=NEXT_VIT, objective={"frozen_norms": True, "frozen_stages": 1}, batch={"micro_slots": 2})
    assert frozen.norm_group_images is None
    assert frozen.world_sizes() == [1, 2, 4]


def test_which_heads_have_masks():
    cases = {"mask_rcnn": True, "cascade": True, "faster_rcnn": False}
    assert {head: stage(objective={"head": head}).objective.has_masks for head in cases} == cases
    assert not stage(objective={"head": "cascade", "masks": False}).objective.has_masks


def test_the_gate_compares_with_the_published_box_ap():
    published = {"top1": 80.0, "box_ap": 50.0, "mask_ap": 44.0}
    chain = {"published": published, "stages": {"last": {"objective": {"kind": "detection"}}}}
    assert expand_stages(chain, Path("it.yaml"))["stages"]["last"]["gate"] == {"published": 50.0}
