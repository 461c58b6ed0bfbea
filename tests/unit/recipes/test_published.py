"""Every value of the included recipes against the published tables, and each with its source."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.models import VARIANTS
from pipeline.recipe import load_recipe
from pipeline.recipe.fields import leaf_fields
from pipeline.recipe.value_sources import value_sources
from tests.unit.recipes.published_values import (
    FAMILY_TABLES,
    PUBLISHED_SECTIONS,
    TABLES,
    TASK_STAGES,
    TASK_TABLES,
    assert_stage,
    chain,
    changed_values,
    expected_stages,
    published_result,
    task_entries,
)
from tools.recipes.docs import mentioned, read_conflicts, recipes_page
from tools.recipes.library import SIZES, find_recipe, included_recipes

REPOSITORY = Path(__file__).resolve().parents[3]
FAMILIES = ("convnextv2/", "slak/", "nextvit/", "segmentation/", "detection/")
RESULTS = {
    "segmentation": ("miou", "miou_multi_scale", "parameters", "multiply_adds"),
    "detection": ("box_ap", "mask_ap", "parameters", "multiply_adds"),
}
PUBLISHED = [name for name in included_recipes() if name.startswith(FAMILIES)]
CHAINS = [name for name in PUBLISHED if name.startswith("convnextv2/")]
# Where nothing is published, or the value follows from the model's name or the chain.
NEEDS_NO_SOURCE = {"name", "previous", "objective.kind", "model.depths", "model.dims", "init.start"}
SOURCES = ("paper", "TRAINING", "code", "V1", "JAX", "ours", "data", "all", "unused", "names of", "name of", "derived",
           "mmpretrain", "as Base", "C1", "README", "log", "unverified", "mmseg", "mmdet", "Swin")  # fmt: skip
# The truth of a family's table names a file and its line, or says that there is none.
PLACE = re.compile(r"[\w/-]+\.(py|md|log)\b|ours$|unused$|unverified$|all of |it has none$|paper ")


def learning_rates(name):
    return [stage.learning_rate for stage in chain(name).stages.values()]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "/options/" not in name])
def test_values_and_results_are_the_published_ones(name):
    expected = expected_stages(name)
    assert list(chain(name).stages) == list(expected)
    for stage, values in expected.items():
        assert_stage(chain(name).stages[stage], values)
    result = chain(name).published
    fields = RESULTS.get(name.partition("/")[0], ("top1",))
    assert [result and getattr(result, field) for field in fields] == published_result(name)
    assert all(is_caught for _, is_caught in changed_values(name))


def test_learning_rates():
    """The paper's tables print the product with the batch too."""
    scratch = TABLES["pretrain"]["learning_rate"]
    after_22k = [TABLES[table]["learning_rate"] for table in ("intermediate", "finetune_after_22k")]
    for size, rate in zip(SIZES, TABLES["finetune"]["learning_rates"], strict=True):
        assert learning_rates(f"convnextv2/{size}") == pytest.approx([scratch, rate])
    for name in [name for name in CHAINS if "-22k" in name and "/options/" not in name]:
        assert learning_rates(name) == pytest.approx([scratch, *after_22k]), name
    for name in [name for name in CHAINS if "-supervised" in name]:
        assert learning_rates(name) == pytest.approx([TABLES["supervised"]["learning_rate"]])
    for family, table in FAMILY_TABLES.items():
        for name in table["recipes"]:
            first, *last = chain(f"{family}/{name}").stages.values()
            assert first.learning_rate == pytest.approx(table["learning_rate"][0])
            assert [stage.schedule.min_lr for stage in last] == pytest.approx([s.learning_rate for s in last]), name


def test_a_place_stands_behind_every_value_of_the_families():
    for table in FAMILY_TABLES.values():
        groups = [table[key] for key in ("every", "supervised", "finetune") if key in table]
        recipes = [recipe.get("finetune", {}) | recipe for recipe in table["recipes"].values()]
        for group in (*groups, *recipes):
            for field, entry in group.items():
                if field != "finetune":
                    assert len(entry) == 2, field
                    assert PLACE.match(entry[1]), (field, entry[1])
    for task, table in TASK_TABLES.items():
        for which in table["recipes"]:
            for field, (_, place) in task_entries(task, which).items():
                assert PLACE.match(place), (which, field, place)


def test_half_the_epochs_change_pre_training_alone():
    for size in SIZES:
        whole, half = chain(f"convnextv2/{size}"), chain(f"convnextv2/{size}-800")
        assert half.stages["finetune"].fingerprint() == whole.stages["finetune"].fingerprint()


def test_options_change_what_they_say_and_no_more():
    swept = {
        f"{task}/options/{name}": (f"{task}/v2-base", {f"{TASK_STAGES[task]}.{field}": value})
        for task, table in TASK_TABLES.items()
        for name, change in table["options"].items()
        for field, value in change.items()
    }
    others = {
        f"convnextv2/options/{name}": (f"convnextv2/{base}", changes)
        for name, (base, changes) in TABLES["options"].items()
    }
    assert {name for name in PUBLISHED if "/options/" in name} == swept.keys() | others.keys()
    for name, (base, changes) in {**others, **swept}.items():
        option, plain = chain(name), chain(base)
        found = {
            f"{stage}.{field}": value
            for stage, section in option.stages.items()
            for (field, value, _), (_, before, _) in zip(
                leaf_fields(section), leaf_fields(plain.stages[stage]), strict=True
            )
            if value != before and field != "gate.published"  # nobody has published a result with these values
        }
        assert option.stages.keys() == plain.stages.keys()
        assert found == changes, name
        assert option.published is None


def test_results_and_no_others():
    plain = {n.removeprefix("convnextv2/") for n in CHAINS if "/options/" not in n}
    assert plain == TABLES["results"].keys() | set(TABLES["unpublished"])
    for name, numbers in TABLES["results"].items():
        result = chain(f"convnextv2/{name}").published
        assert [result.top1, result.timm_top1, result.timm_top5] == numbers, name
        assert result.source.startswith(("paper T", "paper section"))
        assert (result.weights is None) == (result.timm_top1 is None)
    assert not any(chain(f"convnextv2/{name}").published for name in TABLES["unpublished"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_has_a_source_and_every_conflict_is_listed(name):
    path = find_recipe(name)
    given, comments = value_sources(path), []
    for stage_name, stage in load_recipe(path).stages.items():
        sections = PUBLISHED_SECTIONS if stage.sparsity else PUBLISHED_SECTIONS - {"sparsity"}
        for field, _, is_operational in leaf_fields(stage, without_absent=True):
            if is_operational or field in NEEDS_NO_SOURCE or field.partition(".")[0] not in sections:
                continue
            source = given.get(f"stages.{stage_name}.{field}") or given.get(field)
            assert source is not None, f"{field} of {stage_name} is not given in {path}"
            assert source.comment.startswith(SOURCES), f"{source.file}:{source.line}: {source.comment!r}"
            comments.append(source.comment)
    folder = name.partition("/")[0]
    folders = ("convnextv2", folder) if folder in TASK_TABLES else ("convnextv2",)
    known = {key for folder in folders for key in read_conflicts(REPOSITORY / "recipes" / folder / "conflicts.yaml")}
    assert set(mentioned(comments)) <= known


@pytest.mark.parametrize("folder", ["convnextv2", "segmentation", "detection"])
def test_conflicts_name_options_that_exist(folder):
    for conflict in read_conflicts(REPOSITORY / "recipes" / folder / "conflicts.yaml").values():
        for option in conflict.options.replace(",", " ").split():
            if option.startswith("options/"):
                changed = chain(f"{folder}/{option}")
                base = yaml.safe_load(find_recipe(f"{folder}/{option}").read_text())["extends"]
                plain = load_recipe(find_recipe(f"{folder}/{option}").parent / base)
                assert any(changed.stages[n].fingerprint() != plain.stages[n].fingerprint() for n in plain.stages), (
                    option
                )
            elif "=" in option:
                last = "base" if folder == "convnextv2" else f"{folder}/v2-base"
                stage = "huge-22k-512" if "intermediate." in option or "pretrain" in option else last
                load_recipe(find_recipe(stage), [option])


def test_variants_are_those_of_the_paper():
    variants = TABLES["variants"].items()
    published = {f"convnextv2_{size}": (tuple(depths), tuple(dims)) for size, (depths, dims) in variants}
    assert {name: VARIANTS[name] for name in published} == published
    for size in SIZES:
        assert {stage.model.name for stage in chain(f"convnextv2/{size}").stages.values()} == {f"convnextv2_{size}"}


def test_the_page_is_current():
    assert (REPOSITORY / "docs" / "recipes.md").read_text() == recipes_page(), "fcmae recipe docs > docs/recipes.md"
