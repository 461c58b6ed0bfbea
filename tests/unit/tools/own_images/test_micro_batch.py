"""How many slots go through the model at once."""

import subprocess
import weakref
from types import SimpleNamespace

import pytest
import torch

from pipeline.cost.measure import Measured
from pipeline.recipe import load_recipe
from tests.support import tiny_recipe
from tools.own_images import micro_batch
from tools.own_images.micro_batch import CPU_IMAGES, choose_micro_slots, measure_micro_batch, micro_sizes


@pytest.fixture
def stage(tmp_path):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    return lambda *overrides: load_recipe(path, overrides).stages["pretrain"]


def test_sizes_divide_the_share_of_a_process(stage):
    recipe = stage("defaults.batch.global_batch=96", "defaults.batch.slot=8")
    assert micro_sizes(recipe, 1) == [1, 2, 3, 4, 6, 12]
    assert micro_sizes(recipe, 4) == [1, 3]
    assert micro_sizes(stage("defaults.model.response=bn"), 1) == [1]


def test_a_cpu_gets_the_largest_that_fits_its_memory(stage, monkeypatch):
    recipe = stage("defaults.batch.global_batch=256", "defaults.batch.slot=8")
    assert choose_micro_slots(recipe, 1, "cpu")[0] * 8 == CPU_IMAGES
    monkeypatch.setattr("tools.own_images.micro_batch.available_bytes", lambda: 2**20)
    slots, why = choose_micro_slots(recipe, 1, "cpu")
    assert slots == 1
    assert why.startswith("the smallest")


@pytest.mark.parametrize("late", [True, False])
def test_what_a_gpu_has_measured_counts_if_the_rest_takes_too_long_or_fails(stage, late, monkeypatch):
    """All sizes share one time-out, in which each is also compiled, so the later ones may not be measured."""
    recipe = stage("defaults.batch.global_batch=256", "defaults.batch.slot=8")
    command = ["sh", "-c", "echo '[1, 60.0]'; echo '[2, 100.0]'; exit 1"]
    monkeypatch.setattr(micro_batch, "module_command", lambda *words: command)
    if late:
        run = subprocess.run

        def run_late(command: list[str], **how: object) -> None:
            output = run(command, stdout=subprocess.PIPE).stdout
            raise subprocess.TimeoutExpired(command, 300.0, output)

        monkeypatch.setattr(subprocess, "run", run_late)
    slots, why = choose_micro_slots(recipe, 1, "cuda")
    assert slots == 2
    assert why.startswith("measured: 100 images a second, before")
    command[2] = "exit 1"
    slots, why = choose_micro_slots(recipe, 1, "cuda")
    assert slots == 1
    assert why.startswith("the smallest")


def test_sizes_are_measured_upwards_without_the_model_of_the_last_one(stage, monkeypatch):
    recipe = stage("defaults.batch.global_batch=256", "defaults.batch.slot=8")
    speeds, models = {1: 60.0, 2: 100.0, 4: 101.0}, []

    def measure(recipe, steps):
        assert not any(model() for model in models)
        model = torch.nn.Linear(1, 1)
        model.forward = model.forward  # as a compiled block refers to itself
        models.append(weakref.ref(model))
        images = recipe.batch.micro_slots * recipe.batch.slot
        return Measured("cuda", images, images / speeds[recipe.batch.micro_slots], 2**20, 2**20)

    monkeypatch.setattr("pipeline.cost.measure.measure_steps", measure)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=2**30))
    assert list(measure_micro_batch(recipe, [1, 2, 4, 8])) == [(1, 60.0), (2, pytest.approx(100.0))]
