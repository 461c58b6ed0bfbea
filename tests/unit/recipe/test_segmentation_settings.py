"""Segmentation stages: which recipes are refused, and how a norm group lies on ranks."""

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import StageRecipe
from pipeline.recipe.segmentation_settings import divide_norm_group
from pipeline.recipe.yaml_files import expand_stages, parse_settings

SMALL = {
    "objective": {"kind": "segmentation", "classes": 3, "norm_group": 8},
    "model": {"name": "convnextv2", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "data": {"train": "train.beton", "image_size": 64, "scenes": {"base_size": [128, 64], "window_step": 42}},
    "batch": {"global_batch": 16, "slot": 2},
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 10, "warmup_steps": 2, "decay": "poly"},
}


def stage(**changes) -> StageRecipe:
    return parse_settings(
        StageRecipe, {**SMALL, **{name: {**SMALL.get(name, {}), **c} for name, c in changes.items()}}, "it"
    )


@pytest.mark.parametrize("unit", [1, 2, 4, 8])
@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16])
def test_every_number_of_ranks_that_fits_has_the_same_norm_groups(unit, slots, world):
    """The units of a group, by what the ranks really run: rank r has the units r, r + W, ..."""
    group, total = 16, 192
    placed = divide_norm_group(group, unit, unit * slots, world)
    if placed is None or total // unit % (world * slots):
        return
    own = [list(range(rank, total // unit, world)) for rank in range(world)]
    per_rank = placed.images // unit
    groups = []
    for first in range(0, world, placed.ranks):
        for start in range(0, len(own[0]), per_rank):
            assert start // slots == (start + per_rank - 1) // slots, "a chunk lies in one micro-batch"
            groups.append(sorted(u for rank in own[first : first + placed.ranks] for u in rank[start:][:per_rank]))
    units = group // unit
    assert sorted(groups) == [list(range(at, at + units)) for at in range(0, total // unit, units)]


def test_ranks_that_cannot_share_a_norm_group_are_left_out():
    assert stage(batch={"micro_slots": 1}).world_sizes() == [4, 8, 16]
    assert stage(batch={"micro_slots": 2}).world_sizes() == [2, 4]
    assert stage(batch={"micro_slots": 4}).world_sizes() == [1, 2]
    assert stage(objective={"norm": "group"}).world_sizes() == [1, 2, 4, 8, 16]
    with pytest.raises(RecipeError, match=r"1 processes .* groups of 8 images; use 2 .*, or set .* \(now 2\) to 4"):
        stage(batch={"micro_slots": 2}).check_world_size(1)
    assert [stage().micro_slots_on(ranks) for ranks in (1, 2, 3, 4, 8, 16)] == [[4, 8], [2, 4], [], [1, 2], [1], [1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"norm_group": 6}}, "norm_group 6 must divide batch.global_batch 16"),
        ({"objective": {"norm_group": 1}, "batch": {"slot": 1}}, "two images or more, .*; raise it, or set objective"),
        ({"model": {"name": "convnextv2", "response": "bn"}, "objective": {"norm_group": 6}}, "change one of them$"),
        ({"sparsity": {"distribution": "snip"}}, "snip, which scores one slot .* a norm group; set it to handed_on"),
        (
            {"optimizer": {"layer_decay_groups": "stage_wise"}, "model": {"depths": [1, 1], "dims": [8, 16]}},
            "stage_wise, made for models of four stages, and model.depths has 2; set it to single",
        ),
        (
            {"batch": {"micro_slots": 3}},
            "fits no number of ranks, .* set it to 4 for 1 rank, or to 1",
        ),
        ({"data": {"scenes": None}}, "data.scenes is missing"),
        ({"data": {"erase_probability": 0.25}}, "data.erase_probability is 0.25"),
        ({"model": {"depths": [1], "dims": [8]}}, "needs the maps of two or more"),
        ({"data": {"image_size": [64, 32]}}, "window_step 42 is more than a side of data.image_size 64x32"),
        ({"gate": {"metric": "top1", "at_least": 1.0}}, "segmentation is judged by miou"),
        ({"objective": {"kind": "classification", "classes": 3, "norm_group": None}}, "norm_group"),
        ({"optimizer": {"base_lr": 1e-3}}, "base_lr 0.001 and lr 0.001: give one of them"),
        ({"optimizer": {"lr": None}}, "give one of them"),
        ({"schedule": {"epochs": 3.0}}, "epochs 3.0 and steps 10: give one of them"),
        ({"schedule": {"warmup_steps": 10}}, "warmup_steps 10 must be less than steps 10"),
        ({"optimizer": {"layer_decay_groups": "layer_wise_6"}}, "made for the depths 3, 3, 9, 3"),
        ({"init": {"head": "map"}}, "init.head is map"),
        (
            {"evaluation": {"every_steps": 5, "every_epochs": 2.0}},
            "evaluation: every_epochs 2 and every_steps 5 are both",
        ),
        (
            {"checkpoint": {"keep_every_steps": 5, "keep_every_epochs": 2.0}},
            "checkpoint: keep_every_epochs 2 and keep_every_steps 5 are both given: set one of them to null",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(changes, message):
    with pytest.raises(RecipeError, match=message) as error:
        stage(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "value"), [("segmentation", 40.0), ("classification", 80.0)])
def test_the_gate_compares_with_the_published_result_of_the_last_stages_objective(kind, value):
    chain = {"published": {"top1": 80.0, "miou": 40.0}, "stages": {"last": {"objective": {"kind": kind}}}}
    assert expand_stages(chain, Path("it.yaml"))["stages"]["last"]["gate"] == {"published": value}


def test_without_batchnorm_a_norm_group_is_not_looked_at():
    alone = stage(objective={"norm": "group", "norm_group": 1}, sparsity={"distribution": "snip"})
    assert alone.norm_group_images is None
    four = stage(optimizer={"layer_decay_groups": "stage_wise"})
    assert four.optimizer.layer_decay_groups == "stage_wise"


def test_length_and_rate_of_a_stage():
    recipe = stage()
    assert (recipe.total_steps(7), recipe.learning_rate) == (10, 1e-3)
    by_epochs = stage(schedule={"steps": None, "epochs": 1.5}, optimizer={"lr": None, "base_lr": 1.6e-2})
    assert (by_epochs.total_steps(7), by_epochs.learning_rate) == (11, 1e-3)
