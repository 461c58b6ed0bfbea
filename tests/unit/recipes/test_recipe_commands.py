"""Output and errors of `fcmae recipe`."""

import re
import sys

import pytest
import yaml

from pipeline.data.beton_writer import BetonWriter
from pipeline.recipe import load_recipe
from pipeline.recipe.value_sources import value_sources
from tests.support import tiny_image
from tools import cli
from tools.recipes.library import find_recipe


@pytest.fixture
def recipe(capsys, monkeypatch):
    """Run `fcmae recipe` and return its output, or the error if it fails."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fcmae", "recipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert bool(end.value.code) == bool(printed.err), printed
        return printed.err or printed.out

    return run


def squeezed(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_diff_prints_only_what_differs(recipe):
    assert squeezed(recipe("diff", "huge", "base")) == [
        "field convnextv2_huge convnextv2_base",
        "pretrain.model.name convnextv2_huge convnextv2_base",
        "finetune.objective.drop_path 0.3 0.1",
        "finetune.model.name convnextv2_huge convnextv2_base",
        "finetune.optimizer.base_lr 0.00125 0.000625",
        "finetune.optimizer.layer_decay 0.75 0.6",
        "finetune.optimizer.layer_decay_groups single group",
        "finetune.schedule.epochs 50 100",
        "finetune.schedule.warmup_epochs 10 20",
    ]
    assert squeezed(recipe("diff", "huge-22k-512", "huge-22k-384")) == [
        "field convnextv2_huge-22k-512 convnextv2_huge-22k-384",
        "finetune.data.image_size 512 384",
    ]
    assert squeezed(recipe("diff", "demo", "demo-scratch"))[1] == "stage pretrain yes -"
    assert recipe("diff", "atto", "convnextv2/atto.yaml").startswith("no difference")


@pytest.mark.parametrize(("name", "stage"), [("demo-segmentation", "segment"), ("demo-detection", "detect")])
def test_the_arms_of_a_demo_differ_in_their_initial_weights_alone(recipe, name, stage):
    assert squeezed(recipe("diff", name, f"{name}-scratch")) == [
        f"field {name} {name}-scratch",
        f"{stage}.init.start file previous",
        f"{stage}.init.weights runs/demo-fcmae/pretrain/weights.safetensors none",
    ]


def test_list_has_the_published_results(recipe):
    lines = squeezed(recipe("list"))
    assert "convnextv2/huge-22k-512 FCMAE 1600 > 22K 90 > 1K 30, 512 88.9 paper T5, T15, README 88.860 98.740" in lines
    assert any(line.startswith("demo ") for line in lines)


def test_sources_tell_file_line_and_conflict(recipe):
    lines = squeezed(recipe("show", "base", "--sources", "stages.finetune.schedule.epochs=30"))
    written = find_recipe("base").read_text().splitlines()
    number = 1 + next(i for i, line in enumerate(written) if "base_lr" in line)
    assert f"optimizer.base_lr 0.000625 TRAINING; C1 base.yaml:{number}" in lines
    assert "schedule.epochs 30 command line" in lines
    conflict = " ".join(lines)[" ".join(lines).index("C1 base learning rate") :]
    assert "Paper: 6.25e-3 for Base and Large" in conflict
    assert "options/base-paper-lr" in conflict


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("stages.pretrain.schedule.epochs=-1", "stages.pretrain.schedule.epochs is -1: input should be greater than 0"),
        (
            "stages.finetune.optimizer.layer_decay_groups=blocks",
            "stages.finetune.optimizer.layer_decay_groups is 'blocks': input should be 'single', 'group',",
        ),
        (
            "defaults.model.name=convnextv2_tiny stages.finetune.optimizer.layer_decay_groups=group",
            "stages.finetune: optimizer.layer_decay_groups is group, made for the depths 3, 3, 27, 3",
        ),
        ("stages.finetune.data.crop_scale=[0.5,1.5]", "crop_scale: [0.5, 1.5] asks for a crop larger than the image"),
        ("stages.finetune.data.crop_pct=1.5", "crop_pct is 1.5: input should be less than or equal to 1"),
        ("stages.intermediate.batch.slot=48", "global_batch 4096 is not a multiple of slot 48"),
        ("init=x.pt stages.pretrain.init.start=scratch", "start scratch and weights x.pt do not go together"),
        ("--nproc 48", "48 processes do not divide the 128 slots"),
    ],
)
def test_a_wrong_value_is_one_sentence(recipe, change, sentence):
    line = recipe("validate", "huge-22k-512", *change.split())
    assert sentence in line
    assert line.count("\n") == 1


def test_a_22k_head_on_1k_data_is_refused_where_the_file_is(recipe, tmp_path):
    with BetonWriter(tmp_path / "1k.beton", tuple(f"class {i}" for i in range(1000)), 2) as writer:
        for number in range(2):
            writer.add(*tiny_image(number))
    change = f"stages.intermediate.data.train={tmp_path}/1k.beton"
    line = recipe("validate", "huge-22k-512", change)
    assert f"stage intermediate: objective.classes is 21841, but data.train {tmp_path}/1k.beton holds 1000" in line


def test_data_that_is_not_here_is_told_and_no_error(recipe, monkeypatch):
    monkeypatch.delenv("FCMAE_DATA", raising=False)
    line = recipe("validate", "huge-22k-512", "--nproc", 64)
    assert line.startswith("convnextv2_huge-22k-512 is valid: pretrain, intermediate, finetune; not here")


def test_a_name_that_is_not_known_lists_near_ones(recipe):
    assert "did you mean convnextv2/huge" in recipe("show", "convnext/huge")


def test_extends_takes_several_files_and_included_recipes(tmp_path):
    (tmp_path / "big.yaml").write_text("stages:\n  finetune:\n    data: {image_size: 256}  # mine\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: [convnextv2/base, big.yaml]\nname: mine\npublished: {top1: 1.0, source: me}\n")
    recipe = load_recipe(mine)
    assert recipe.stages["finetune"].data.image_size == 256
    assert recipe.stages["finetune"].optimizer.layer_decay == 0.6
    assert recipe.published.timm_top1 is None
    found = value_sources(mine)
    assert found["stages.finetune.data.image_size"].comment == "mine"
    assert found["stages.finetune.data.image_size"].line == 3
    assert found["stages.finetune.optimizer.layer_decay"].file.name == "base.yaml"
    mine.write_text("extends: [1]\nname: mine\n")
    with pytest.raises(cli.UserError, match="must be the path of a YAML file, or a list of paths"):
        load_recipe(mine)


def test_sources_follow_the_values_through_every_kind_of_line(tmp_path):
    """Each value of a loaded recipe is found in the line that its source names."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: demo\nname: mine   # not a value\ndefaults:\n  batch: {global_batch: 64, slot: 16}  # both; C9\n"
        "stages:\n  pretrain:\n    optimizer:\n      betas: [0.8,\n              0.9]   # two lines\n"
        "    schedule: {epochs: 5}\n  intermediate: null\n"
    )
    found, recipe = value_sources(path), load_recipe(path)
    assert not any(name.startswith("stages.intermediate") for name in found)
    for stage in ("pretrain", "finetune"):
        assert recipe.stages[stage].batch.slot == 16
        assert found[f"stages.{stage}.batch.slot"].comment == "both; C9"
    assert found["stages.pretrain.optimizer.betas"].comment == "two lines"
    assert found["stages.pretrain.schedule.epochs"].comment == ""
    given = yaml.safe_load(path.read_text())
    assert recipe.stages["pretrain"].schedule.epochs == given["stages"]["pretrain"]["schedule"]["epochs"]
