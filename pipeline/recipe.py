"""The typed recipe of a chain of stages, and of one stage.

A recipe is YAML. `extends: other.yaml` starts from another file; `defaults:` is what the stages share; a stage set to
null is left out. Every key is checked; those marked Operational may change on resume, all others make another
experiment.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RecipeError

_OPERATIONAL = object()


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change on resume: it says how fast or where, not what is computed."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    name: str = "convnextv2"
    depths: tuple[int, ...] | None = None
    """Blocks of each stage; None takes the named variant's."""
    dims: tuple[int, ...] | None = None
    stem_stride: int = Field(4, ge=1)
    """Pixels on a side of a stem patch."""

    @property
    def stride(self) -> int:
        """Pixels on a side of a cell: of one site of the last stage."""
        return self.stem_stride * 2 ** (len(self.depths or (1, 1, 1, 1)) - 1)

    @model_validator(mode="after")
    def _whole(self) -> "Model":
        if (self.depths is None) != (self.dims is None) or len(self.depths or ()) != len(self.dims or ()):
            raise ValueError(
                f"depths {self.depths} and dims {self.dims} must be given together, one number for each stage"
            )
        return self


class FCMAESettings(Section):
    kind: Literal["fcmae"] = "fcmae"
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    decoder_dim: int = Field(512, ge=1)
    decoder_depth: int = Field(1, ge=1)
    normalize_target: bool = True
    grn_statistics: Literal["image", "batch"] = "image"
    encoder_backend: Literal["packed", "masked"] = operational("packed")


class ClassificationSettings(Section):
    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution; 0 turns it off."""
    cutmix: float = Field(0.0, ge=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    head_init_scale: float = Field(0.001, ge=0)


class Data(Section):
    train: str = operational(...)
    """Path of a .beton file; which data it must hold is fixed by its hash once a stage has started."""
    validation: str = operational(...)
    image_size: int = Field(224, ge=1)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Evaluation: the short side becomes image_size / crop_pct, then the centre is cut; 1 squashes to a square."""
    workers: int = operational(1, ge=1)
    """Decoding threads of each rank."""
    timeout_seconds: float = operational(120.0, gt=0)
    """How long a batch may take before the loader is given up."""


class Batch(Section):
    global_batch: int = Field(ge=1)
    """Images per step."""
    slot: int = Field(ge=1)
    """Images per slot: the group within which images are mixed. global_batch must be a multiple."""
    micro_slots: int = operational(1, ge=1)
    """Slots that go through the model at once: memory against speed."""

    @property
    def slots(self) -> int:
        return self.global_batch // self.slot

    @model_validator(mode="after")
    def _divisible(self) -> "Batch":
        if self.global_batch % self.slot:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of slot {self.slot}; choose a slot that divides it"
            )
        return self


class Optimizer(Section):
    base_lr: float = Field(gt=0)
    """Learning rate per 256 images: lr = base_lr * global_batch / 256."""
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = Field(1.0, gt=0, le=1)
    layer_decay_groups: Literal["single", "group"] = "single"
    decay_grn: bool = False
    """Weight decay on GRN's gamma and beta and on the mask token, as the official pre-training has it."""
    clip_norm: float | None = Field(None, gt=0)


class Schedule(Section):
    epochs: float = Field(gt=0)
    warmup_epochs: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Schedule":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return self


class Engine(Section):
    kind: Literal["ddp"] = operational("ddp")
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16 is autocast over fp32 parameters; fp64 is for proofs."""
    threads: int = operational(0, ge=0)
    """Torch threads per rank; 0 shares the machine's cores among its ranks."""


class Initial(Section):
    start: Literal["previous", "scratch"] = "previous"
    """Weights of the stage before, or none."""
    head: Literal["new", "keep"] = "new"


class Evaluation(Section):
    every_epochs: float = operational(1.0, gt=0)
    batch: int = operational(256, ge=1)


class Checkpoint(Section):
    every_steps: int = operational(500, ge=1)
    keep_last: int = operational(2, ge=1)


class Tracking(Section):
    mlflow: bool = operational(True)
    mlflow_uri: str | None = operational(None)
    """None keeps a sqlite store inside the run."""
    experiment: str = operational("fcmae")
    log_every_steps: int = operational(10, ge=1)
    """How often the step losses are read from the device."""
    pictures: int = operational(8, ge=0)
    """Images in each reconstruction picture."""


class StageRecipe(Section):
    """Everything one stage does. `name`, `seed` and `previous` are filled in from the chain."""

    name: str = ""
    seed: int = 0
    previous: str | None = None
    objective: FCMAESettings | ClassificationSettings = Field(discriminator="kind")
    model: Model = Model()
    data: Data
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of the weights, per step."""
    handoff: Literal["model", "ema"] = "model"
    """Which weights are evaluated and handed on."""
    init: Initial = Initial()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> "StageRecipe":
        if self.handoff == "ema" and self.ema is None:
            raise ValueError("handoff is ema but ema has no decay; set ema, for example to 0.9999")
        if isinstance(self.objective, FCMAESettings) and self.optimizer.layer_decay != 1:
            raise ValueError(
                f"optimizer.layer_decay is {self.optimizer.layer_decay}; pre-training has none, set it to 1"
            )
        if isinstance(self.objective, FCMAESettings) and self.data.image_size % self.model.stride:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of the cell, {self.model.stride} pixels"
                " (model.stem_stride * 2 ** (stages - 1)); change one of them"
            )
        return self

    @property
    def learning_rate(self) -> float:
        return self.optimizer.base_lr * self.batch.global_batch / 256

    def fingerprint(self) -> str:
        """sha256 of the semantic fields: equal fingerprints are the same experiment."""
        facts = {path: value for path, value, is_operational in _leaves(self) if not is_operational}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def check_world_size(self, world_size: int) -> None:
        """Raise RecipeError unless the slots divide evenly into micro-batches over `world_size` ranks."""
        slots, micro = self.batch.slots, self.batch.micro_slots
        if slots % world_size or (slots // world_size) % micro:
            fits = [w for w in range(1, slots + 1) if slots % w == 0 and (slots // w) % micro == 0]
            below = max((w for w in fits if w < world_size), default=None)
            above = min((w for w in fits if w > world_size), default=None)
            near = " or ".join(str(w) for w in (below, above) if w) or f"batch.micro_slots=1 (now {micro})"
            raise RecipeError(
                f"stage {self.name}: {world_size} processes do not divide the {slots} slots of a global batch"
                f" into micro-batches of {micro}; use {near} processes"
            )


class ChainRecipe(Section):
    """A named chain of stages, in order."""

    name: str
    seed: int = 0
    stages: dict[str, StageRecipe]


def load(path: Path, overrides: Sequence[str] = ()) -> ChainRecipe:
    """Read a chain recipe and apply `key=value` overrides (`stages.pretrain.schedule.epochs=10`, `defaults...`).

    Raises:
        RecipeError: naming the file and field, the value, and what would be accepted.
    """
    raw = _read(path, seen=())
    if overrides:
        wrong = [text for text in overrides if "=" not in text]
        if wrong:
            raise RecipeError(f"override {wrong[0]!r} is not of the form key=value")
        try:
            merged = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.from_dotlist(list(overrides)))
            raw = OmegaConf.to_container(merged, resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise RecipeError(f"override {' '.join(overrides)!r} cannot be applied: {_first_line(error)}") from None
    return _validate(ChainRecipe, _spread(raw, path), str(path))


def load_stage(path: Path) -> StageRecipe:
    """Read the resolved recipe of one stage."""
    return _validate(StageRecipe, _read(path, seen=()), str(path))


def dump(recipe: Section, path: Path) -> None:
    """Write a resolved recipe, every field present."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def changes(old: StageRecipe, new: StageRecipe) -> tuple[list[str], list[str]]:
    """Fields that differ, as "path: old -> new": the semantic ones, and the operational ones."""
    before = {path: value for path, value, _ in _leaves(old)}
    after = {path: (value, is_operational) for path, value, is_operational in _leaves(new)}
    semantic, other = [], []
    for path in [*after, *(before.keys() - after.keys())]:
        value, is_operational = after.get(path, (None, False))
        if before.get(path) != value:
            (other if is_operational else semantic).append(f"{path}: {before.get(path)} -> {value}")
    return semantic, other


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra or {}
            yield prefix + name, list(value) if isinstance(value, tuple) else value, bool(extra.get("operational"))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}; break the circle")
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; `fcmae recipes` lists the ones that are included") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds a {type(raw).__name__}; a recipe is a mapping of keys to values")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends is {base!r}; it must be the path of one YAML file")
    return _merge(_read(path.parent / base, (*seen, path)), raw)


def _merge(base: Any, change: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}


def _spread(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Give every stage the shared defaults, its name, the seed, and the stage before it."""
    raw = dict(raw)
    defaults, stages = raw.pop("defaults", None) or {}, raw.get("stages")
    if not isinstance(stages, dict) or not any(stages.values()):
        raise RecipeError(f"{path}: stages is {stages!r}; a recipe needs at least one stage, as a mapping of names")
    seed, spread, previous = raw.get("seed", 0), {}, None
    for name, stage in stages.items():
        if stage is None:
            continue
        if not str(name).replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"{path}: stage name {name!r} must be made of letters, digits, - and _")
        start = (stage.get("init") or {}).get("start") if isinstance(stage, dict) else None
        before = None if start == "scratch" else previous
        # The objective's keys depend on its kind, so defaults for it cannot apply to every stage.
        spread[name] = {"name": name, "seed": seed, "previous": before, **_merge(defaults, stage)}
        previous = name
    return {**raw, "stages": spread}


def _validate(kind: type[Section], raw: dict[str, Any], source: str) -> Any:
    try:
        # JSON mode is strict about types and still takes a list for a tuple.
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise RecipeError(f"{source}: {_sentence(kind, error)}") from None
    except TypeError as error:
        raise RecipeError(f"{source}: {error}") from None


def _sentence(kind: type[Section], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"] if part not in ("fcmae", "classification")]
    field, value = ".".join(where), first.get("input")
    if first["type"] == "extra_forbidden":
        known = _known_keys(kind, first["loc"][:-1])
        near = get_close_matches(where[-1], known, n=3, cutoff=0.5) or sorted(known)
        return f"unknown key {field}; did you mean {' or '.join(near)}?"
    if first["type"] == "missing":
        return f"{field} is missing; give it a value"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {reason}" if field else reason
    return f"{field} is {value!r}: {reason[0].lower()}{reason[1:]}"


def _known_keys(kind: type[Section], location: Sequence[str | int]) -> set[str]:
    current: Any = kind
    for part in location:
        if current is ChainRecipe and part == "stages":
            current = _OPERATIONAL  # the next part is a stage's name
        elif current is _OPERATIONAL:
            current = StageRecipe
        else:
            sections = [current, *get_args(current)]
            fields = {
                name: f
                for s in sections
                if isinstance(s, type) and issubclass(s, Section)
                for name, f in s.model_fields.items()
            }
            if part in fields:
                current = fields[part].annotation
            elif part in ("fcmae", "classification"):
                current = {"fcmae": FCMAESettings, "classification": ClassificationSettings}[str(part)]
    sections = [current, *get_args(current)]
    return {name for s in sections if isinstance(s, type) and issubclass(s, Section) for name in s.model_fields}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
