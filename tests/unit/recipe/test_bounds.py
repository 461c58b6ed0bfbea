"""Every number of a recipe, a site or a study lies between bounds, and what lies outside is refused by its name."""

import json
import os

import pytest
import yaml
from pydantic import TypeAdapter

import cluster.site
import tools.evaluate.published
import tools.study.definition  # noqa: F401 (their settings are examined too)
from cluster.site import Site, check_stage_names, load_site
from pipeline.data.stage_data import check_stage_data
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.settings_base import Settings
from pipeline.recipe.yaml_files import LIBRARY
from tests.support import tiny_data

RECIPE = """
name: small
stages:
  only:
    objective: {kind: classification, classes: 2}
    data: {train: train.beton}
    batch: {global_batch: 8, slot: 8}
    optimizer: {base_lr: 0.1}
    schedule: {epochs: 2}
"""


def _numbers(schema, path=""):
    """(path, schema) of every number in a schema of pydantic's core."""
    if isinstance(schema, list | tuple):
        for item in schema:
            yield from _numbers(item, path)
    elif isinstance(schema, dict):
        if schema.get("type") in ("int", "float"):
            yield path, schema
            return
        for key, value in schema.items():
            if key not in ("metadata", "serialization", "ref", "default"):
                yield from _numbers(value, f"{path}.{key}" if schema.get("type") == "model-fields" else path)
        for key, value in (schema.get("fields") or {}).items() if schema.get("type") == "model-fields" else ():
            yield from _numbers(value, f"{path}.{key}")


def _below(kind):
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def test_every_number_of_every_setting_has_bounds():
    kinds = [kind for kind in _below(Settings) if kind.__module__.partition(".")[0] in ("pipeline", "cluster", "tools")]
    found = [
        (kind.__name__, path, number) for kind in kinds for path, number in _numbers(TypeAdapter(kind).core_schema)
    ]
    assert len(found) > 150
    assert {"StageRecipe", "Site", "PreflightSettings", "GPU"} <= {kind for kind, _, _ in found}
    for kind, path, number in found:
        assert {"ge", "gt"} & number.keys(), f"{kind}{path} needs a lower bound"
        assert {"le", "lt"} & number.keys(), f"{kind}{path} needs an upper bound"


def test_the_walk_sees_a_number_without_bounds():
    class Unbounded(Settings):
        numbers: dict[str, tuple[float, ...]] = {}  # noqa: RUF012
        one: int | None = None

    found = list(_numbers(TypeAdapter(Unbounded).core_schema))
    assert {path.rpartition(".")[2] for path, _ in found} >= {"numbers", "one"}
    assert not any({"le", "lt"} & number.keys() for _, number in found)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 2", "epochs: .inf", "stages.only.schedule.epochs is inf"),
        ("epochs: 2", "epochs: .nan", "stages.only.schedule.epochs is nan"),
        ("epochs: 2", "epochs: 1e300", "stages.only.schedule.epochs is 1e+300"),
        ("epochs: 2", f"epochs: {'1' * 5000}", "a number of 5,000 characters on line 9"),
        ("epochs: 2", f"epochs: 0x{'f' * 300}", "stages.only.schedule.epochs is 1721"),
        ("epochs: 2", "epochs: 2, epochs: 3", "the key epochs occurs twice on line 9"),
        ("base_lr: 0.1", "base_lr: .inf", "stages.only.optimizer.base_lr is inf"),
        ("train: train.beton", "train: train.beton, image_size: 100000000000", "in pixels from 1 to 16,384"),
        ("train: train.beton", "train: train.beton, image_size: [64, 1e9]", "in pixels from 1 to 16,384"),
        ("base_lr: 0.1", "base_lr: 0.1, betas: [0.9, 1.5]", "stages.only.optimizer.betas"),
    ],
)  # fmt: skip
def test_a_number_without_sense_is_refused(tmp_path, old, new, words):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert words in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time_limit_minutes: 100000000000000000000", "time_limit_minutes is 1000"),
        ("nodes: .inf", "nodes is inf"),
        ("nodes: 1\nnodes: 2", "the key nodes occurs twice on line 2"),
        ("nods: 2", "unknown key nods; did you mean nodes"),
        ("preflight: {disk_gb: 2}", "unknown key preflight.disk_gb; did you mean disk_gib"),
        ("stages: {finetune: {nods: 2}}", "unknown key nods; did you mean nodes"),
        ("sbatch: {nice: 100000000000000000000}", "sbatch.nice"),
        ("a: [" * 5000, "nested more than 64 deep"),
        ("a: &a [*a]", "an alias contains itself"),
    ],
)  # fmt: skip
def test_a_site_is_as_strict_as_a_recipe(tmp_path, text, words):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_site(str(path))
    assert words in str(error.value)


def test_a_site_names_stages_that_there_are():
    site = Site(stages={"finetun": {"nodes": 2}})
    with pytest.raises(UserError, match=r"unknown key stages\.finetun; did you mean finetune\?"):
        check_stage_names(site, ["pretrain", "finetune"])
    # A site may serve many recipes.
    check_stage_names(Site(stages={"pretrain": {"nodes": 2}, "mine": {"nodes": 2}}), ["mine"])


def test_every_included_file_is_read_as_by_omegaconf():
    from omegaconf import OmegaConf

    from pipeline.storage.bounded_files import parse_yaml, yaml_text

    files = [*LIBRARY.rglob("*.yaml"), *cluster.site.INCLUDED_SITES.glob("*.yaml")]
    assert len(files) > 60
    for path in files:
        value = parse_yaml(path.read_text())
        assert value == OmegaConf.to_container(OmegaConf.create(path.read_text()), resolve=False), path
        assert parse_yaml(yaml_text(value)) == value
        assert yaml_text(value) == yaml.safe_dump(value, sort_keys=False, width=120)


def test_texts_that_look_like_numbers_are_written_with_quotes():
    from pipeline.storage.bounded_files import parse_yaml, yaml_text

    names = ["1e5", "1e-3", "2026-11-29", "yes", "0x1f", "1_000", ".5e+3", "-1E9"]
    assert parse_yaml(yaml_text(names)) == names


def test_a_recipe_extends_regular_files_alone_and_not_too_many(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for base in ("/dev/zero", "pipe", "folder"):
        (tmp_path / "small.yaml").write_text(f"extends: {base}\n{RECIPE}")
        with pytest.raises(UserError, match="cannot be read: "):
            load_recipe(tmp_path / "small.yaml")
    for number in range(6):  # each extends the next one six times: 46,656 files
        bases = f"[{', '.join([f'{number + 1}.yaml'] * 6)}]" if number < 5 else "[]"
        (tmp_path / f"{number}.yaml").write_text(f"extends: {bases}\n{RECIPE}")
    with pytest.raises(UserError, match="extends more than 256 files"):
        load_recipe(tmp_path / "0.yaml")


def test_a_stage_has_no_more_steps_than_checkpoints_can_number(tmp_path):
    tiny_data(tmp_path, train=8, validation=8)
    side_car = tmp_path / "train.beton.json"
    content = json.loads(side_car.read_text())
    side_car.write_text(json.dumps({**content, "samples": 4 * 10**9, "samples_per_class": [10**9] * 4}))
    url = f"file://{tmp_path}/train.beton"  # of a URL the side-car alone is read
    (tmp_path / "small.yaml").write_text(RECIPE.replace("train.beton", url).replace("classes: 2", "classes: 4"))
    with pytest.raises(UserError, match=r"epochs is 2, which is 1,000,000,000 steps, and checkpoints can number"):
        check_stage_data(load_recipe(tmp_path / "small.yaml").stages["only"])
