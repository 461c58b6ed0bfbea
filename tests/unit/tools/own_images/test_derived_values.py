"""The rules give a valid recipe for any number of images, and the values that docs/photographs.md states."""

import pytest

from pipeline.recipe import load_recipe
from tools.own_images.derived_values import ImageFacts, derive
from tools.recipes.library import find_recipe

BASES = {"pretrain": "own-images", "finetune": "convnextv2/tiny"}


def stage_of(kind):
    return load_recipe(find_recipe(BASES[kind])).stages[kind]


def derived(kind, images, *, weights=False, side=500, device="cuda", **given):
    facts = ImageFacts(images, side, weights, None, device)
    given = {name.replace("__", "."): value for name, value in given.items()}
    return {field: value for field, (value, _) in derive(kind, stage_of(kind), facts, given).items()}


@pytest.mark.parametrize(
    ("kind", "images", "weights", "expected"),
    [
        ("pretrain", 495, False, (16, 1, 1.2e-3, 800)),
        ("pretrain", 495, True, (16, 1, 1.2e-3, 200)),
        ("pretrain", 5_000, True, (256, 16, 3e-4, 200)),
        ("pretrain", 100_000, False, (1024, 64, 1.5e-4, 413)),
        ("pretrain", 1_281_167, False, (1024, 64, 1.5e-4, 100)),
        ("finetune", 6, True, (4, 1, 6.4e-3, 300)),
        ("finetune", 495, True, (16, 4, 3.2e-3, 100)),
        ("finetune", 100_000, True, (256, 16, 8e-4, 100)),
    ],
)
def test_stated_values(kind, images, weights, expected):
    values = derived(kind, images, weights=weights)
    fields = ("batch.global_batch", "batch.slot", "optimizer.base_lr", "schedule.epochs")
    assert tuple(values[field] for field in fields) == pytest.approx(expected)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("images", [*range(1, 40), 63, 64, 65, 1000, 12_345, 10**7])
def test_every_number_of_images_gives_a_valid_recipe(kind, images):
    values = derived(kind, images)
    texts = [f"stages.{kind}.{field}={value}" for field, value in values.items()]
    stage = load_recipe(find_recipe(BASES[kind]), texts).stages[kind]
    assert stage.batch.global_batch <= images
    assert stage.batch.slots >= min(4, stage.batch.global_batch)


def test_given_values_are_not_derived_and_others_follow_from_them():
    values = derived("finetune", 10_000, batch__global_batch=48, schedule__epochs=2, ema=None)
    assert not {"batch.global_batch", "schedule.epochs", "ema"} & values.keys()
    assert values["batch.slot"] == 12
    assert values["schedule.warmup_epochs"] == 0.2
    assert values["evaluation.every_epochs"] == 1


@pytest.mark.parametrize(("side", "expected"), [(2000, 224), (112, 224), (111, 128), (70, 96), (20, 96)])
def test_small_images_are_not_blown_up(side, expected):
    assert derived("pretrain", 1000, side=side)["data.image_size"] == expected


def test_the_average_forgets_the_initial_weights_in_short_runs():
    assert [derived("finetune", 64, schedule__epochs=epochs)["ema"] for epochs in (1, 25, 300)] == [0.5, 0.9, 0.9917]


def test_the_devices_differ_in_precision_and_not_in_what_is_learnt():
    cpu, gpu = (derived("pretrain", 1000, device=device) for device in ("cpu", "cuda"))
    assert {field for field in cpu if cpu[field] != gpu.get(field)} == {"engine.precision", "evaluation.batch"}


def test_steps_and_a_plain_rate_replace_epochs_and_the_rate_per_256_images():
    facts = ImageFacts(1600, 256, given_weights=False, weights_size=None, device="cuda")
    values = derive("finetune", stage_of("finetune"), facts, {"schedule.steps": 1000, "optimizer.lr": 1e-4})
    assert values["schedule.epochs"].value is None
    assert values["optimizer.base_lr"].value is None
    epochs = 1000 / (1600 // values["batch.global_batch"].value)
    assert values["schedule.warmup_epochs"].value == pytest.approx(0.1 * epochs, rel=1e-2)
