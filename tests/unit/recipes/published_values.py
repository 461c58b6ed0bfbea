"""What each included recipe must say, from the tables beside this file, and the comparison with what it says.

    python -m tests.unit.recipes.published_values

changes every value of every recipe once, and prints how many of the changes the comparison catches.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from pipeline.recipe import ChainRecipe, StageRecipe, load_recipe
from pipeline.recipe.fields import leaf_fields
from tools.recipes.library import SIZES, find_recipe

# PyYAML takes 1e-4 without a dot for text, so the tables have 1.0e-4.
TABLES = yaml.safe_load((Path(__file__).parent / "paper_tables.yaml").read_text())
FAMILY_TABLES = yaml.safe_load((Path(__file__).parent / "family_tables.yaml").read_text())
TASK_TABLES = {
    task: yaml.safe_load((Path(__file__).parent / f"{task}_tables.yaml").read_text())
    for task in ("segmentation", "detection")
}
TASK_STAGES = {"segmentation": "segment", "detection": "detect"}
# Not in the tables: what follows from the chain, and what nobody publishes.
OURS = {"objective.kind", "model.depths", "model.dims", "seed", "batch.slot"}
# The others are this program's own, and off unless a recipe turns them on.
PUBLISHED_SECTIONS = {"seed", "objective", "model", "data", "batch", "optimizer", "schedule", "ema", "handoff", "init",
                      "engine", "sparsity"}  # fmt: skip


@cache
def chain(name: str) -> ChainRecipe:
    return load_recipe(find_recipe(name))


def expected(table: dict, place: int) -> dict:
    """A column of one of the paper's tables."""
    columns = {field: row[place] for field, row in table.get("columns", {}).items()}
    return {"sparsity": None, **TABLES["every_stage"], **table["all"], **columns}


def expected_stages(name: str) -> dict[str, dict]:
    """The values of each stage of a recipe, by their names in the recipe; none for an option."""
    family, _, which = name.partition("/")
    if family in TASK_TABLES:
        values = {field: value for field, (value, _) in task_entries(family, which).items()}
        before = _of_convnext(which.removeprefix("v2-")) if which.endswith("-supervised") else {}
        return {**before, TASK_STAGES[family]: values}
    return _of_convnext(which) if family == "convnextv2" else _of_family(FAMILY_TABLES[family], which)


def task_entries(task: str, which: str) -> dict[str, list]:
    """(value, place) of each field of a recipe for segmentation or detection."""
    row = TASK_TABLES[task]["recipes"][which]
    own = {field: entry for field, entry in row.items() if field not in ("groups", "published")}
    entries: dict[str, list] = {}
    for group in row["groups"]:
        entries |= TASK_TABLES[task]["groups"][group]
    return {**entries, **own}


def _of_convnext(which: str) -> dict[str, dict]:
    size, *words = which.removeprefix("v1-").split("-")
    name = {"model.name": f"convnextv2_{size}"}
    if "supervised" in words:
        table = TABLES["supervised"]
        of_v1 = table["v1"] if which.startswith("v1-") else {}
        epochs = {"schedule.epochs": 100} if words[-1] == "100" else {}
        return {"supervised": {**expected(table, table["sizes"].index(size)), **of_v1, **epochs, **name}}
    place = SIZES.index(size)
    pretrain = {**expected(TABLES["pretrain"], place), **name}
    if "22k" not in words:
        epochs = {"schedule.epochs": 800} if "800" in words else {}
        return {"pretrain": {**pretrain, **epochs}, "finetune": {**expected(TABLES["finetune"], place), **name}}
    pixels = next((int(word) for word in words if word.isdigit()), 224)
    squash = {"data.image_size": pixels, "data.crop_pct": 0.875 if pixels < 384 else 1.0}
    intermediate, last = (expected(TABLES[table], place - 3) for table in ("intermediate", "finetune_after_22k"))
    return {"pretrain": pretrain, "intermediate": {**intermediate, **name}, "finetune": {**last, **squash, **name}}


def _of_family(table: dict, which: str) -> dict[str, dict]:
    size, _, rest = which.partition("-")
    own = {**table["recipes"][size], **(table["recipes"][which] if rest.startswith("120") else {})}
    stages = {"supervised": {**table["every"], **table.get("supervised", {}), **own}}
    if rest == "384":
        changed = table["recipes"][which].get("finetune", {})
        stages["finetune"] = {**table["every"], **table["finetune"], **own, **changed}
    return {
        stage: {field: value for field, (value, _) in values.items() if field != "published"}
        for stage, values in stages.items()
    }


def published_result(name: str) -> list:
    """What is printed for a recipe: its accuracy; of segmentation mIoU, mIoU with several scales, parameters, MACs; of
    detection box AP, mask AP, parameters, MACs."""
    family, _, which = name.partition("/")
    if family in TASK_TABLES:
        return TASK_TABLES[family]["recipes"][which]["published"][:4]
    return [_published_top1(family, which)]


def _published_top1(family: str, which: str) -> float | None:
    if family == "convnextv2":
        return TABLES["results"].get(which, [None])[0]
    return FAMILY_TABLES[family]["recipes"][which]["published"][0]


def assert_stage(stage: StageRecipe, values: dict) -> None:
    """These values, and no other that makes the experiment."""
    _assert_values(list(leaf_fields(stage)), _claimed(stage), values)


def _claimed(stage: StageRecipe) -> set[str]:
    makes_it = {name for name, _, operational in leaf_fields(stage, without_absent=True) if not operational}
    ours = {"objective.kind"} if stage.objective.kind in TASK_TABLES else OURS
    return {name for name in makes_it if name.partition(".")[0] in PUBLISHED_SECTIONS} - ours


def _assert_values(fields: list, claimed: set[str], values: dict) -> None:
    found = {field: value for field, value, _ in fields}
    assert claimed <= values.keys()
    for field, value in values.items():
        if isinstance(value, list | float | int) and not isinstance(value, bool):
            assert found[field] == pytest.approx(value, rel=1e-6), field
        else:
            assert found[field] == value, field


def changed_values(name: str) -> Iterator[tuple[str, bool]]:
    """Change each value of a recipe that the tables have, alone; yield its name and whether that is caught."""
    for stage_name, values in expected_stages(name).items():
        stage = chain(name).stages[stage_name]
        fields, claimed = list(leaf_fields(stage)), _claimed(stage)
        _assert_values(fields, claimed, values)
        for place, (field, value, operational) in enumerate(fields):
            if field in claimed:
                changed = [*fields[:place], (field, _another(value), operational), *fields[place + 1 :]]
                try:
                    _assert_values(changed, claimed, values)
                except AssertionError:
                    yield f"{stage_name}.{field}", True
                else:
                    yield f"{stage_name}.{field}", False


def _another(value: object) -> object:
    """A value that is not this one: of a number, one that is off by a hundredth."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 1.01 or 0.01
    if isinstance(value, list):
        return [_another(value[0]), *value[1:]]
    return "another" if value is None else None


def main() -> None:
    from tools.recipes.library import included_recipes

    caught = total = 0
    families = (*(f"{task}/" for task in TASK_TABLES), "convnextv2/", "slak/", "nextvit/")
    for name in included_recipes():
        if name.startswith(families) and "/options/" not in name:
            for field, is_caught in changed_values(name):
                total, caught = total + 1, caught + is_caught
                if not is_caught:
                    print(f"not caught: {name}: {field}")
    print(f"caught {caught}/{total}")
    raise SystemExit(caught != total)


if __name__ == "__main__":
    main()
