"""Recipes as YAML files: `extends`, shared `defaults`, `key=value` overrides, and errors that name the field."""

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe.schema import ChainRecipe, StageRecipe
from pipeline.recipe.sections import Section

_STAGE_NAME = object()
_TAGGED = ("objective", "model")  # one of several sections, told by the value of a key of it


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
    return validate(ChainRecipe, _spread(raw, path), str(path))


def load_stage(path: Path) -> StageRecipe:
    """Read the resolved recipe of one stage."""
    return validate(StageRecipe, _read(path, seen=()), str(path))


def dump(recipe: Section, path: Path) -> None:
    """Write a resolved recipe, every field present."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


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
    published, gate = raw.get("published"), spread[previous].get("gate") or {}
    if isinstance(published, dict) and published.get("top1") is not None and isinstance(gate, dict):
        spread[previous]["gate"] = {"published": published["top1"], **gate}  # the paper's value is the last stage's
    return {**raw, "stages": spread}


def validate(kind: type[Section], raw: dict[str, Any], source: str) -> Any:
    try:
        # JSON mode is strict about types and still takes a list for a tuple.
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise RecipeError(f"{source}: {_sentence(kind, error)}") from None
    except TypeError as error:
        raise RecipeError(f"{source}: {error}") from None


def _sentence(kind: type[Section], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = [str(part) for _, part, is_tag in _walk(kind, first["loc"]) if not is_tag]
    field, value = ".".join(where), first.get("input")
    if first["type"] == "union_tag_not_found":
        return f"{field}.{first['ctx']['discriminator'][1:-1]} is missing; give it a value"
    if first["type"] == "union_tag_invalid":
        known = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
        near = get_close_matches(first["ctx"]["tag"], known, n=3, cutoff=0.5) or known
        key = first["ctx"]["discriminator"][1:-1]
        return f"{field}.{key} is {first['ctx']['tag']!r}; choose one of {', '.join(near)}"
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
    *_, (current, _, _) = _walk(kind, (*location, None))
    return {name for section in _sections(current) for name in section.model_fields}


def _walk(kind: type[Section], location: Sequence[str | int | None]) -> Iterator[tuple[Any, Any, bool]]:
    """For each part of an error's location: the annotation it is part of, the part, and whether it is no key but the
    tag that pydantic puts behind one to say which section was meant."""
    current: Any = kind
    for before, part in zip((None, *location), location, strict=False):
        fields = {name: field for section in _sections(current) for name, field in section.model_fields.items()}
        meant = [s for s in _sections(current) if any(part in get_args(f.annotation) for f in s.model_fields.values())]
        is_tag = before in _TAGGED and len(_sections(current)) > 1 and part not in fields and bool(meant)
        yield current, part, is_tag
        if current is ChainRecipe and part == "stages":
            current = _STAGE_NAME  # the next part is a stage's name
        elif current is _STAGE_NAME:
            current = StageRecipe
        elif is_tag:
            current = meant[0]
        elif part in fields:
            current = fields[part].annotation


def _sections(annotation: Any) -> list[type[Section]]:
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
