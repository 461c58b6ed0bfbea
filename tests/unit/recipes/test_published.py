"""Every value of the included recipes against the published tables, and each with its source."""

from pathlib import Path

import pytest
import yaml

from pipeline.models import VARIANTS
from pipeline.recipe import load_recipe
from pipeline.recipe.schema import leaf_fields
from pipeline.recipe.value_sources import value_sources
from tools.recipes.docs import mentioned, read_conflicts, recipes_page
from tools.recipes.library import SIZES, find_recipe, included_recipes

# PyYAML takes 1e-4 without a dot for text, so the tables have 1.0e-4.
TABLES = yaml.safe_load((Path(__file__).parent / "paper_tables.yaml").read_text())
REPOSITORY = Path(__file__).resolve().parents[3]
CHAINS = [name for name in included_recipes() if name.startswith("convnextv2/")]
# Where nothing is published, or the value follows from the model's name or the chain.
NEEDS_NO_SOURCE = {"name", "previous", "objective.kind", "model.depths", "model.dims", "init.start"}
# Not in the tables: the model's name and the previous stage are asserted by themselves, the rest nobody publishes.
OURS = {"objective.kind", "model.name", "model.depths", "model.dims", "seed", "batch.slot"}
# The others are this program's own, and off unless a recipe turns them on.
PUBLISHED_SECTIONS = {"seed", "objective", "model", "data", "batch", "optimizer", "schedule", "ema", "handoff", "init",
                      "engine", "health"}  # fmt: skip
SOURCES = ("paper", "TRAINING", "code", "V1", "JAX", "ours", "data", "all", "unused", "names of", "name of", "derived",
           "mmpretrain", "as Base", "C1")  # fmt: skip


def chain(name):
    return load_recipe(find_recipe(f"convnextv2/{name}"))


def expected(table, place):
    columns = {field: row[place] for field, row in table.get("columns", {}).items()}
    return {**TABLES["every_stage"], **table["all"], **columns}


def assert_stage(stage, values):
    """These values, and no other that makes the experiment."""
    found = {field: value for field, value, _ in leaf_fields(stage)}
    makes_it = {name for name, _, operational in leaf_fields(stage, without_absent=True) if not operational}
    makes_it = {name for name in makes_it if name.partition(".")[0] in PUBLISHED_SECTIONS - {"health"}}
    assert makes_it - values.keys() <= OURS
    for field, value in values.items():
        if isinstance(value, list | float | int) and not isinstance(value, bool):
            assert found[field] == pytest.approx(value, rel=1e-6), field
        else:
            assert found[field] == value, field


@pytest.mark.parametrize("size", SIZES)
def test_fcmae_and_imagenet_1k(size):
    place = TABLES["sizes"].index(size)
    recipe = chain(size)
    assert list(recipe.stages) == ["pretrain", "finetune"]
    assert_stage(recipe.stages["pretrain"], expected(TABLES["pretrain"], place))
    assert_stage(recipe.stages["finetune"], expected(TABLES["finetune"], place))
    assert recipe.stages["pretrain"].learning_rate == pytest.approx(TABLES["pretrain"]["learning_rate"])
    assert recipe.stages["finetune"].learning_rate == pytest.approx(TABLES["finetune"]["learning_rates"][place])
    half = chain(f"{size}-800")
    assert half.stages["pretrain"].schedule.epochs == 800
    assert half.stages["finetune"].fingerprint() == recipe.stages["finetune"].fingerprint()


@pytest.mark.parametrize(
    ("size", "pixels"), [(s, p) for s in SIZES[3:] for p in (224, 384, 512) if p < 512 or s == "huge"]
)
def test_imagenet_22k_and_then_1k(size, pixels):
    place = TABLES["sizes"].index(size) - 3
    recipe = chain(f"{size}-22k" + (f"-{pixels}" if pixels > 224 else ""))
    assert list(recipe.stages) == ["pretrain", "intermediate", "finetune"]
    squash = {"data.image_size": pixels, "data.crop_pct": 0.875 if pixels < 384 else 1.0}
    assert_stage(recipe.stages["pretrain"], expected(TABLES["pretrain"], place))
    assert_stage(recipe.stages["intermediate"], expected(TABLES["intermediate"], place))
    assert_stage(recipe.stages["finetune"], {**expected(TABLES["finetune_after_22k"], place), **squash})
    assert recipe.stages["intermediate"].learning_rate == pytest.approx(TABLES["intermediate"]["learning_rate"])
    assert recipe.stages["finetune"].learning_rate == pytest.approx(TABLES["finetune_after_22k"]["learning_rate"])


@pytest.mark.parametrize("size", TABLES["supervised"]["sizes"])
def test_supervised_from_scratch(size):
    table = TABLES["supervised"]
    values = expected(table, table["sizes"].index(size))
    for name, changed in ((f"{size}-supervised", {}), (f"v1-{size}-supervised", table["v1"])):
        (stage,) = chain(name).stages.values()
        assert_stage(stage, {**values, **changed})
        assert stage.model.name == f"convnextv2_{size}"
        assert stage.learning_rate == pytest.approx(table["learning_rate"])


def test_options_change_what_they_say_and_no_more():
    assert {name.rpartition("/")[2] for name in CHAINS if "/options/" in name} == TABLES["options"].keys()
    for name, (base, changes) in TABLES["options"].items():
        option, plain = chain(f"options/{name}"), chain(base)
        found = {
            f"{stage}.{field}": value
            for stage, section in option.stages.items()
            for (field, value, _), (_, before, _) in zip(
                leaf_fields(section), leaf_fields(plain.stages[stage]), strict=True
            )
            if value != before
        }
        assert option.stages.keys() == plain.stages.keys()
        assert found == changes, name


def test_results_and_no_others():
    plain = {n.removeprefix("convnextv2/") for n in CHAINS if "/options/" not in n}
    assert plain == TABLES["results"].keys() | set(TABLES["unpublished"])
    for name, numbers in TABLES["results"].items():
        result = chain(name).published
        assert [result.top1, result.timm_top1, result.timm_top5] == numbers, name
        assert result.source.startswith("paper T")
        assert (result.weights is None) == (result.timm_top1 is None)
    assert not any(chain(name).published for name in TABLES["unpublished"])


@pytest.mark.parametrize("name", CHAINS)
def test_every_value_has_a_source_and_every_conflict_is_listed(name):
    path = find_recipe(name)
    given, comments = value_sources(path), []
    for stage_name, stage in load_recipe(path).stages.items():
        for field, _, is_operational in leaf_fields(stage, without_absent=True):
            if is_operational or field in NEEDS_NO_SOURCE or field.partition(".")[0] not in PUBLISHED_SECTIONS:
                continue
            source = given.get(f"stages.{stage_name}.{field}") or given.get(field)
            assert source is not None, f"{field} of {stage_name} is not given in {path}"
            assert source.comment.startswith(SOURCES), f"{source.file}:{source.line}: {source.comment!r}"
            comments.append(source.comment)
    known = read_conflicts(REPOSITORY / "recipes" / "convnextv2" / "conflicts.yaml")
    assert set(mentioned(comments)) <= known.keys()


def test_conflicts_name_options_that_exist():
    for conflict in read_conflicts(REPOSITORY / "recipes" / "convnextv2" / "conflicts.yaml").values():
        for option in conflict.options.replace(",", " ").split():
            if option.startswith("options/"):
                changed = chain(option)
                base = yaml.safe_load(find_recipe(f"convnextv2/{option}").read_text())["extends"]
                plain = load_recipe(find_recipe(f"convnextv2/{option}").parent / base)
                assert any(changed.stages[n].fingerprint() != plain.stages[n].fingerprint() for n in plain.stages), (
                    option
                )
            elif "=" in option:
                stage = "huge-22k-512" if "intermediate" in option or "pretrain" in option else "base"
                load_recipe(find_recipe(f"convnextv2/{stage}"), [option])


def test_variants_are_those_of_the_paper():
    variants = TABLES["variants"].items()
    published = {f"convnextv2_{size}": (tuple(depths), tuple(dims)) for size, (depths, dims) in variants}
    assert {name: VARIANTS[name] for name in published} == published
    for size in SIZES:
        assert {stage.model.name for stage in chain(size).stages.values()} == {f"convnextv2_{size}"}


def test_the_page_is_current():
    assert (REPOSITORY / "docs" / "recipes.md").read_text() == recipes_page(), "fcmae recipe docs > docs/recipes.md"
