"""The YAML file of a study: a recipe, arms that change it, seeds, and published values to compare with."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.errors import RecipeError, StageError
from pipeline.recipe import ChainRecipe, StageRecipe, load_recipe
from pipeline.recipe.settings_base import ASCENDING, Percent, Seed, Settings
from pipeline.recipe.yaml_files import parse_settings, read_mapping
from pipeline.storage.bounded_files import yaml_text
from pipeline.storage.folder import Folder
from tools.recipes.library import find_recipe

Positive = Annotated[float, Field(gt=0, le=1e9)]

STUDY_FILE = "study.yaml"  # in the directory of a study


class PublishedFigures(Settings):
    """Published figures beside the accuracy on ImageNet-1K. None is one that is not known."""

    parameters: Positive | None = None
    """Millions."""
    multiply_adds: Positive | None = None
    """Billions for an image."""
    tensorrt: Positive | None = None
    """Milliseconds of a batch of 8 images on TensorRT in fp16."""
    coreml: Positive | None = None
    """Milliseconds of an image on CoreML on a phone."""
    box_ap: Percent | None = None
    """COCO detection, average precision of boxes."""
    mask_ap: Percent | None = None
    """COCO, average precision of masks."""
    miou: Percent | None = None
    """ADE20K segmentation, mean intersection over union."""

    TITLES: ClassVar[dict[str, str]] = {
        "parameters": "M parameters", "multiply_adds": "GMACs", "tensorrt": "TensorRT ms", "coreml": "CoreML ms",
        "box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU",
    }  # fmt: skip


class Arm(Settings):
    """A variant of the recipe."""

    recipe: str | None = None
    """Replaces the study's recipe."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe by dotted key, such as `stages.pretrain.objective.mask_ratio: 0.5`."""
    published: Percent | None = None
    """Published top-1, mean IoU or box AP in percent; the default for an arm without changes is the recipe's."""
    published_multi_scale: Percent | None = None
    """Published mean IoU with several scales and flips, shown but not compared; the default is as for `published`."""
    expected: Annotated[tuple[Percent, Percent], ASCENDING] | None = None
    """The band of the final top-1, mean IoU or box AP in percent, outside of which the arm is off track; in a ladder
    the next rung then does not start."""
    figures: PublishedFigures = PublishedFigures()
    """Other published figures."""
    curve: str = ""
    """The curve of `fcmae study curves` that the arm is a point of."""
    remark: str = ""


class Reference(Settings):
    """A published result of a model that this program does not train."""

    name: str
    top1: Percent | None = None
    miou: Percent | None = None
    """Of segmentation, instead of top1."""
    box_ap: Percent | None = None
    """Of detection, instead of top1."""
    figures: PublishedFigures = PublishedFigures()
    curve: str = ""
    """As an arm's."""
    source: str

    @model_validator(mode="after")
    def _check_result(self) -> "Reference":
        if sum(value is not None for value in (self.top1, self.miou, self.box_ap)) != 1:
            raise ValueError(
                f"top1 {self.top1}, miou {self.miou} and box_ap {self.box_ap} of {self.name}: give one of them"
            )
        return self

    @property
    def result(self) -> float:
        """In percent."""
        return next(value for value in (self.top1, self.miou, self.box_ap) if value is not None)


class Study(Settings):
    name: str
    about: str
    """The question that the study answers."""
    source: str = ""
    """The paper and table of the published values."""
    recipe: str
    """Path or name of the recipe that arms change."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipes of all arms; an arm's own changes come later and win."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    ladder: bool = False
    """Whether the arms are rungs: each starts only when the one before it is done and on track."""
    arms: dict[str, Arm] = Field(min_length=1)
    pairs: tuple[tuple[str, str], ...] = ()
    """The arms to compare seed by seed, as [arm, minus]. Default: all arms with the first one."""
    references: tuple[Reference, ...] = ()
    axes: tuple[Literal["parameters", "multiply_adds", "epochs"], ...] = ()
    """The axes of `fcmae study curves`, a panel for each: of `figures`, or the epochs of pre-training."""
    figures_source: str = ""
    """Where the other published figures come from, and which are not known."""
    overrides: tuple[str, ...] = ()
    """`key=value` of the command line, which win over the arms' changes."""

    @model_validator(mode="after")
    def _check_seeds(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} names one twice, which would count its run twice; leave it out")
        return self

    @property
    def known_figures(self) -> dict[str, str]:
        """Field and column title of each kind of published figure that some arm or reference has."""
        all_figures = [each.figures for each in (*self.arms.values(), *self.references)]
        known = {name for figures in all_figures for name in figures.model_dump(exclude_none=True)}
        return {name: title for name, title in PublishedFigures.TITLES.items() if name in known}

    def figure_texts(self, figures: PublishedFigures) -> tuple[str, ...]:
        """The figures as texts, one for each of `known_figures`; empty where one is not known."""
        values = [getattr(figures, name) for name in self.known_figures]
        return tuple("" if v is None else f"{v:.1f}" if v >= 1 else f"{v:g}" for v in values)

    def chain(self, arm: str, seed: int) -> ChainRecipe:
        """The recipe of one arm with one seed.

        Raises:
            RecipeError: if the recipe is wrong; names study and arm.
        """
        try:
            chain = load_recipe(*self.origin(arm, seed))
        except RecipeError as error:
            raise RecipeError(f"study {self.name}, arm {arm}: {error}") from None
        if all(stage.seed != seed for stage in chain.stages.values()):
            fixed = next(iter(chain.stages.values())).seed
            raise RecipeError(
                f"study {self.name}, arm {arm}: the recipe's seed is {fixed} in the run for seed {seed}, so the runs of"
                f" all seeds would be the same; give seeds=[{fixed}] instead"
            )
        *_, last = chain.stages.values()
        if last.data.validation is None:
            raise RecipeError(
                f"study {self.name}, arm {arm}: stages.{last.name}.data.validation is null, so there would be no result"
                " to compare; give a file"
            )
        return self._with_band(chain, arm, last)

    def _with_band(self, chain: ChainRecipe, arm: str, last: StageRecipe) -> ChainRecipe:
        """The chain with the expected band as the gate of its last stage; in a ladder this gate stops."""
        band, update = self.arms[arm].expected, {"stop": True} if self.ladder else {}
        if band:
            if last.objective.kind == "fcmae":
                raise RecipeError(
                    f"study {self.name}, arm {arm}: expected is a band of top-1, but stage {last.name} is"
                    f" pre-training; set stages.{last.name}.gate in the arm's change"
                )
            low, high = band
            # The band replaces the fixed distance from the published value.
            update |= {"metric": last.objective.metric, "at_least": low, "at_most": high, "published": None}
        if not update:
            return chain
        last = last.model_copy(update={"gate": last.gate.model_copy(update=update)})
        return chain.model_copy(update={"stages": {**chain.stages, last.name: last}})

    def origin(self, arm: str, seed: int) -> tuple[Path, list[str]]:
        """The recipe file of an arm, and all changes to it as `key=value`."""
        changes = {**self.change, **self.arms[arm].change, "seed": seed, "name": f"{self.name}-{arm}-{seed}"}
        texts = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return find_recipe(self.arms[arm].recipe or self.recipe), [*texts, *self.overrides]

    def published(self, arm: str) -> float | None:
        """Published top-1, single-scale mean IoU or box AP of the arm, or of its recipe if the arm changes nothing."""
        return self.published_values(arm)[0]

    def published_text(self, arm: str) -> str:
        """The published value of an arm, or the labelled one of several scales; empty if neither is known."""
        value, several = self.published_values(arm)
        return f"{value:.1f}" if value is not None else "" if several is None else f"{several:.1f} (multi-scale)"

    def published_values(self, arm: str) -> tuple[float | None, float | None]:
        """The published value of an arm, and that of several scales."""
        own = self.arms[arm]
        given = own.published, own.published_multi_scale
        if given != (None, None) or own.change or self.change:
            return given
        chain = load_recipe(find_recipe(own.recipe or self.recipe))
        published, last = chain.published, list(chain.stages.values())[-1]
        if published and last.objective.kind in ("segmentation", "detection"):
            published = published.model_copy(update={"top1": None})  # that of the classifier it starts from
        return (published.result, published.miou_multi_scale) if published else given


@dataclass(frozen=True)
class StudyRun:
    """An arm with a seed, and its run directory."""

    arm: str
    seed: int
    directory: Path


def study_runs(study: Study, directory: Path) -> Iterator[StudyRun]:
    """All runs of a study: all arms with the first seed come first, so that they can be compared early."""
    for seed in study.seeds:
        for arm in study.arms:
            yield StudyRun(arm, seed, directory / arm / f"seed-{seed}")


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study. The overrides `seeds=...` and `arms...` change the study, all others the recipes of its arms.

    Raises:
        RecipeError: names the file and field, the value, and what is allowed.
    """
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] in ("seeds", "arms")]
    others = [text for text in overrides if text not in own]
    known = read_mapping(path).get("arms")
    known = known if isinstance(known, dict) else {}
    left_out = {name for name in known if f"arms.{name}=null" in own}  # found here, because a name may have a dot
    raw = read_mapping(path, [text for text in own if text not in [f"arms.{name}=null" for name in left_out]])
    if isinstance(arms := raw.get("arms"), dict):
        left_out |= {name for name, arm in arms.items() if arm is None}
        for name in left_out - known.keys():
            raise RecipeError(f"{path}: arms.{name}=null leaves out no arm; the arms are {', '.join(known)}")
        raw["arms"] = {name: arm for name, arm in arms.items() if name not in left_out}
    if isinstance(earlier := raw.get("overrides", []), list):
        raw["overrides"] = [*earlier, *others]
    study = parse_settings(Study, raw, str(path))
    for arm in study.arms:
        if not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise RecipeError(f"{path}: arm {arm!r} may have letters, digits, -, _ and dots; rename it")
    for arm in {arm for pair in study.pairs for arm in pair} - study.arms.keys() - left_out:
        raise RecipeError(f"{path}: pairs names the arm {arm!r}, but the arms are {', '.join(study.arms)}")
    pairs = tuple(pair for pair in study.pairs if not left_out & set(pair))
    return study.model_copy(update={"pairs": pairs})


def refuse_another_study(study: Study, directory: Path) -> None:
    """Refuse a directory whose file STUDY_FILE is another study's, or a person's, for `write_study` replaces it.

    Raises:
        StageError: naming the directory.
    """
    path = directory / STUDY_FILE
    try:
        known = load_study(path)
    except RecipeError:  # there is none
        return
    begun = any(run.directory.is_dir() for run in study_runs(known, directory))
    if begun and known.name != study.name:
        raise StageError(f"--out {directory} holds runs of the study {known.name}; choose another directory")
    if not begun and path.read_text() != _text(known):
        raise StageError(f"--out {directory} holds a {STUDY_FILE} that no study wrote; choose another directory")


def write_study(study: Study, path: Path) -> None:
    """Write the study with all published values beside its runs, so that `fcmae study table` needs no other file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arms = {}
    for name, arm in study.arms.items():
        value, several = study.published_values(name)
        arms[name] = arm.model_copy(update={"published": value, "published_multi_scale": several})
    study = study.model_copy(update={"arms": arms})
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(directory, fcntl.LOCK_EX)  # of two commands at once each keeps the other's arms and seeds
        Folder.at(path.parent).publish(path.name, _text(_with_earlier_runs(study, path)).encode())
    finally:
        os.close(directory)


def _text(study: Study) -> str:
    return yaml_text(study.model_dump(mode="json"))


def _with_earlier_runs(study: Study, path: Path) -> Study:
    """The study, with the arms and seeds of earlier commands that it leaves out, so that the table shows their runs."""
    try:
        earlier = load_study(path)
    except RecipeError:  # there is none
        return study
    if earlier.name != study.name:
        return study
    begun = [run for run in study_runs(earlier, path.parent) if run.directory.is_dir()]
    arms = study.arms | {run.arm: earlier.arms[run.arm] for run in begun if run.arm not in study.arms}
    seeds = dict.fromkeys((*study.seeds, *(run.seed for run in begun)))
    pairs = [pair for pair in earlier.pairs if set(pair) <= arms.keys() and not set(pair) <= study.arms.keys()]
    return study.model_copy(update={"arms": arms, "seeds": tuple(seeds), "pairs": (*study.pairs, *pairs)})
