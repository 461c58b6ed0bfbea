"""Read and write recipes as YAML files, with `extends`, `defaults`, `key=value` overrides and errors that name a field.

Values and their sources (`pipeline.recipe.value_sources`) are trees of the same shape, merged by the same code.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from pipeline.errors import RecipeError, first_line, shortened
from pipeline.recipe.chain_recipe import ChainRecipe
from pipeline.recipe.schema import StageRecipe
from pipeline.recipe.sections import Settings
from pipeline.storage.bounded_files import MOST_DEPTH, MOST_YAML_BYTES, parse_yaml, read_text, yaml_text

LIBRARY = Path(__file__).resolve().parents[2] / "recipes"
"""The folder of the included recipes."""
_STAGE_NAME = object()
_MOST_FILES = 256  # that a recipe extends, one counted as often as it is read
_MOST_OVERRIDE_CHARACTERS = 100_000
_FILE_KEYS = {"defaults", "extends", "init"}  # of a recipe file, and of no chain: `expand_stages` distributes them
_TAGGED = ("objective", "model")  # keys with several kinds of sections, selected by the value of one of their keys


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> ChainRecipe:
    """Read a chain recipe and apply `key=value` overrides (`stages.pretrain.schedule.epochs=10`, `defaults...`).

    Raises:
        RecipeError: naming the file and field, the value, and the accepted values; of an override without the file.
    """
    chain = expand_stages(read_mapping(path, overrides), path)
    return parse_settings(ChainRecipe, chain, str(path), [text.partition("=")[0] for text in overrides])


def read_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, merged over the files that it extends, and apply `key=value` overrides.

    Raises:
        RecipeError: as `load_recipe`.
    """
    raw = read_with_bases(path, _read_values)
    if not overrides:
        return raw
    for text in overrides:
        _check_override(text)
    try:
        merged = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:  # TypeError: a list for a mapping
        given = shortened(" ".join(overrides))
        raise RecipeError(f"override {given} cannot be applied: {first_line(error)}") from None


def _check_override(text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"override {shortened(text)} is not of the form key=value")
    try:
        parse_yaml(value)
        if key.count(".") + key.count("[") > MOST_DEPTH or len(text) > _MOST_OVERRIDE_CHARACTERS:
            raise ValueError(f"it is deeper than {MOST_DEPTH} keys, or longer than {_MOST_OVERRIDE_CHARACTERS:,}")
    except ValueError as error:
        raise RecipeError(f"override {shortened(text)} cannot be applied: {first_line(error)}") from None


def load_stage_recipe(path: Path) -> StageRecipe:
    """Read the resolved recipe of one stage."""
    return parse_settings(StageRecipe, read_with_bases(path, _read_values), str(path))


def recipe_text(recipe: Settings) -> str:
    """The file that `write_recipe` writes."""
    return yaml_text(recipe.model_dump(mode="json"))


def write_recipe(recipe: Settings, path: Path) -> None:
    """Write a resolved recipe with every field."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(recipe_text(recipe))
    temporary.replace(path)


def read_with_bases(
    path: Path, parse: Callable[[Path], Any], seen: tuple[Path, ...] = (), opened: list[Path] | None = None
) -> dict[str, Any]:
    """Parse a recipe file, and merge the result over those of the files that it extends, later over earlier ones.

    Args:
        seen: the files that led here.
        opened: all files that were read before for the same recipe.

    Raises:
        RecipeError: if a file is missing, is not YAML or not a mapping, or extends itself.
    """
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}; break the circle")
    opened = [] if opened is None else opened
    opened.append(path)
    if len(opened) > _MOST_FILES:
        raise RecipeError(f"{path}: the recipe extends more than {_MOST_FILES} files; put them into fewer")
    try:
        tree = parse(path)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; `fcmae recipe list` shows the included ones") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds a {type(tree).__name__}; a recipe is a mapping of keys to values")
    bases = tree.get("extends") or []
    names = [bases] if isinstance(bases, str) else bases
    if not (isinstance(names, list) and all(isinstance(name, str) and "\0" not in name for name in names)):
        raise RecipeError(
            f"{path}: extends is {shortened(bases)}; it must be the path of a YAML file, or a list of paths"
        )
    below: dict[str, Any] = {}
    for name in names:
        below = _merge(below, read_with_bases(_base(path, name), parse, (*seen, path), opened))
    merged = _merge(below, {key: value for key, value in tree.items() if key != "extends"})
    if "published" in tree:
        merged["published"] = tree["published"]  # replaced, not merged: results belong to one recipe alone
    return merged


def _base(path: Path, name: str) -> Path:
    """Return the file that a recipe extends: one beside it, or an included recipe by its name."""
    beside = path.parent / name
    return next((p for p in (beside, LIBRARY / name, LIBRARY / f"{name}.yaml") if p.is_file()), beside)


def _read_values(path: Path) -> Any:
    tree = deepcopy(_parsed(read_text(path, MOST_YAML_BYTES)))
    tree = {} if tree is None else tree  # a file may hold comments alone
    if isinstance(tree, dict):
        stages = tree.get("stages")
        for section in (tree, tree.get("defaults"), *(stages.values() if isinstance(stages, dict) else ())):
            if isinstance(section, dict):
                _find_beside(path.parent, section.get("data"), ("train", "validation"))
                _find_beside(path.parent, section, ("init",))
                _find_beside(path.parent, section.get("init"), ("weights",))
    return tree


def _find_beside(folder: Path, section: Any, keys: Sequence[str]) -> None:
    """Replace the relative paths of a section by those of files beside the recipe, where there are such files.

    All others are relative to the current directory, as are those of overrides.
    """
    for key in keys if isinstance(section, dict) else ():
        value = section.get(key)
        if isinstance(value, str) and value and "://" not in value and (folder / value).exists():
            section[key] = str(folder / value)


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Parse YAML, cached, because recipes share files and YAML is slow to read."""
    return parse_yaml(text)


def _merge(base: Any, change: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}


def expand_stages(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Expand a chain's mapping, so that every stage has all its keys.

    Every stage gets the shared defaults, its name, the seed and the name of the stage before it. The first stage gets
    the chain's `init`, its initial weights; the last stage's gate gets the chain's published
    top-1, mIoU or box AP.
    """
    raw = dict(raw)
    defaults, stages, weights = raw.pop("defaults", None) or {}, raw.get("stages"), raw.pop("init", None)
    if not isinstance(stages, dict) or not any(stages.values()):
        raise RecipeError(
            f"{path}: stages is {shortened(stages)}; a recipe needs at least one stage, as a mapping of names"
        )
    seed, expanded, previous = raw.get("seed", 0), {}, None
    for name, stage in stages.items():
        if stage is None:
            continue
        if not str(name).replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"{path}: stage name {shortened(name)} must be made of letters, digits, - and _")
        if not isinstance(stage, dict):
            raise RecipeError(
                f"{path}: stages.{name} is {shortened(stage)}; it must be a mapping of keys to values, or null"
            )
        stage = _merge(defaults, stage)
        init = stage.get("init")
        mistaken = isinstance(init, str | int | float | list)  # left in the stage, for `parse_settings` to refuse
        init = init if isinstance(init, dict) else {}
        if weights is not None and previous is None and not mistaken:
            init = {**init, "weights": weights}
        if init.get("weights") is not None:
            init = {"start": "file", **init}
        before = previous if init.get("start", "previous") == "previous" else None
        expanded[name] = {"name": name, "seed": seed, "previous": before, **stage, **({"init": init} if init else {})}
        previous = name
    published, gate = raw.get("published"), expanded[previous].get("gate") or {}
    if isinstance(published, dict) and isinstance(gate, dict):
        objective = expanded[previous].get("objective")
        kind = objective.get("kind") if isinstance(objective, dict) else None
        if (value := published.get({"segmentation": "miou", "detection": "box_ap"}.get(kind, "top1"))) is not None:
            expanded[previous]["gate"] = {"published": value, **gate}
    return {**raw, "stages": expanded}


def parse_settings(kind: type[Settings], raw: dict[str, Any], source: str, overridden: Sequence[str] = ()) -> Any:
    """Turn a mapping into settings of that kind.

    Args:
        source: the file's name, for errors.
        overridden: keys whose values are not from that file.

    Raises:
        RecipeError: naming the first wrong field, its value, and the accepted values; or a field that holds a secret.
    """
    RecipeError.refuse_secrets(raw, source=source)
    try:
        # JSON mode is strict about types but accepts a list for a tuple.
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        field, why = _explain(kind, error)
        raise RecipeError(why if _is_within(field, overridden) else f"{source}: {why}") from None
    except (TypeError, ValueError) as error:  # a value that JSON does not have, or an integer of thousands of digits
        raise RecipeError(f"{source}: {error}") from None


def _is_within(field: str, overridden: Sequence[str]) -> bool:
    """Whether a field's value is that of an override, of its own key or of one that holds it."""
    names = [field]
    if (parts := field.split(".", 2))[0] == "stages" and len(parts) == 3:
        names.append(f"defaults.{parts[2]}")
    return any(f"{name}.".startswith(f"{key}.") for name in names for key in overridden)


def _explain(kind: type[Settings], error: ValidationError) -> tuple[str, str]:
    """The first wrong field, and a sentence about it."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for _, part, is_tag in _walk(kind, first["loc"]) if not is_tag]
    field, value = ".".join(where), first.get("input")
    if first["type"] == "union_tag_not_found":
        return field, f"{field}.{first['ctx']['discriminator'][1:-1]} is missing; give it a value"
    if first["type"] == "union_tag_invalid":
        known = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
        near = get_close_matches(first["ctx"]["tag"], known, n=3, cutoff=0.5) or known
        key = first["ctx"]["discriminator"][1:-1]
        return field, f"{field}.{key} is {first['ctx']['tag']!r}; choose one of {', '.join(near)}"
    if first["type"] == "extra_forbidden":
        known, deeper = _known_keys(kind, first["loc"][:-1]), []
        if kind is ChainRecipe and len(where) in (1, 3):
            known |= _FILE_KEYS if len(where) == 1 else set()
            deeper = _section_keys(where[1] if len(where) == 3 else "STAGE", where[-1])
        near = get_close_matches(where[-1], known, n=3, cutoff=0.5) or deeper or sorted(known)
        if kind is ChainRecipe and field in StageRecipe.model_fields:
            near = [f"defaults.{field}", f"stages.STAGE.{field}"]
        return field, f"unknown key {field}; did you mean {' or '.join(near)}?"
    if first["type"] == "missing":
        if len(where) == 3 and where[0] == "stages" and where[2] == "objective":
            stage = f"or correct {where[1]} to the name of a stage of this recipe"
            return field, f"{field} is missing; give it a value, {stage}"
        return field, f"{field} is missing; give it a value"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return field, (f"{field}: {reason}" if field else reason)
    return field, f"{field} is {shortened(value)}: {reason[0].lower()}{reason[1:]}"


def _section_keys(stage: str, wanted: str) -> list[str]:
    """The keys of a stage that are spelled almost like `wanted`, such as stages.pretrain.schedule.epochs for epoch."""
    keys = [(name, key) for name, field in StageRecipe.model_fields.items()
            for section in _sections(field.annotation) for key in section.model_fields]  # fmt: skip
    near = get_close_matches(wanted, {key for _, key in keys}, n=1, cutoff=0.8)
    return list(dict.fromkeys(f"stages.{stage}.{name}.{key}" for name, key in keys if key in near))


def _known_keys(kind: type[Settings], location: Sequence[str | int]) -> set[str]:
    *_, (current, _, _) = _walk(kind, (*location, None))
    return {name for section in _sections(current) for name in section.model_fields}


def _walk(kind: type[Settings], location: Sequence[str | int | None]) -> Iterator[tuple[Any, Any, bool]]:
    """Yield (annotation, part, is_tag) for each part of the location of an error.

    annotation: the type of which the part is a key. is_tag: pydantic puts the tag of the selected section behind keys
    such as objective; such a part is not a key of the recipe.
    """
    current: Any = kind
    for before, part in zip((None, *location), location, strict=False):
        fields = {name: field for section in _sections(current) for name, field in section.model_fields.items()}
        tagged = [s for s in _sections(current) if any(part in get_args(f.annotation) for f in s.model_fields.values())]
        is_tag = before in _TAGGED and len(_sections(current)) > 1 and part not in fields and bool(tagged)
        yield current, part, is_tag
        if current is ChainRecipe and part == "stages":
            current = _STAGE_NAME  # the next part is a stage's name
        elif current is _STAGE_NAME:
            current = StageRecipe
        elif is_tag:
            current = tagged[0]
        elif part in fields:
            current = fields[part].annotation


def _sections(annotation: Any) -> list[type[Settings]]:
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
