"""A study: one recipe, arms that change it, seeds; what others published of each arm, and of rivals."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from pipeline.errors import RecipeError
from pipeline.recipe import ChainRecipe, load_recipe
from pipeline.recipe.sections import Settings
from pipeline.recipe.yaml_files import parse_settings, read_mapping
from tools.recipes.library import find_recipe


class Arm(Settings):
    recipe: str | None = None
    """Another recipe than the study's."""
    change: dict[str, Any] = Field(default_factory=dict)
    """`stages.pretrain.objective.mask_ratio: 0.5`: values by the keys that `key=value` takes."""
    published: float | None = None
    """Top-1 that others got; by default, of an arm that changes nothing, the recipe's."""
    remark: str = ""


class Reference(Settings):
    """A published result of something that this program does not train."""

    name: str
    top1: float
    source: str


class Study(Settings):
    name: str
    about: str
    """The question."""
    source: str = ""
    """Where the published values are printed."""
    recipe: str
    """Path or name of the recipe that arms change."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Of all arms, below their own."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    references: tuple[Reference, ...] = ()
    overrides: tuple[str, ...] = ()
    """`key=value` of the command line, above the arms' own."""

    def chain(self, arm: str, seed: int) -> ChainRecipe:
        """The recipe of one arm with one seed.

        Raises:
            RecipeError: naming study and arm.
        """
        try:
            chain = load_recipe(*self.origin(arm, seed))
        except RecipeError as error:
            raise RecipeError(f"study {self.name}, arm {arm}: {error}") from None
        *_, last = chain.stages.values()
        if last.data.validation is None:
            raise RecipeError(
                f"study {self.name}, arm {arm}: stages.{last.name}.data.validation is null, so there would be no result"
                " to compare; name a file"
            )
        return chain

    def origin(self, arm: str, seed: int) -> tuple[Path, list[str]]:
        """The recipe's file of an arm, and all changes to it as `key=value`."""
        changed = {**self.change, **self.arms[arm].change, "seed": seed, "name": f"{self.name}-{arm}-{seed}"}
        dotted = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        return find_recipe(self.arms[arm].recipe or self.recipe), [*dotted, *self.overrides]

    def published(self, arm: str) -> float | None:
        """Top-1 that others got, of the arm or its unchanged recipe."""
        own = self.arms[arm]
        if own.published is not None or own.change or self.change:
            return own.published
        found = load_recipe(find_recipe(own.recipe or self.recipe)).published
        return found.top1 if found else None


@dataclass(frozen=True)
class Cell:
    """An arm with a seed, and its run directory."""

    arm: str
    seed: int
    directory: Path


def cells(study: Study, directory: Path) -> Iterator[Cell]:
    """All of a study, a seed after the other, so that a first row of results is there early."""
    for seed in study.seeds:
        for arm in study.arms:
            yield Cell(arm, seed, directory / arm / f"seed-{seed}")


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's file; `seeds=[0]` and `arms...` change the study, every other override the recipes of its arms.

    Raises:
        RecipeError: naming the file and field, the value, and what would be accepted.
    """
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] in ("seeds", "arms")]
    raw = read_mapping(path, own)
    others = [text for text in overrides if text not in own]
    raw["arms"] = {name: arm for name, arm in (raw.get("arms") or {}).items() if arm is not None}
    study = parse_settings(Study, {**raw, "overrides": [*raw.get("overrides", []), *others]}, str(path))
    for arm in study.arms:
        if not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise RecipeError(f"{path}: arm {arm!r} must be made of letters, digits, -, _ and dots")
    return study


def dump_study(study: Study, path: Path) -> None:
    """Write it beside its runs, so that their table needs nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: arm.model_copy(update={"published": study.published(name)}) for name, arm in study.arms.items()}
    study = study.model_copy(update={"arms": whole})
    path.write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, width=120))
