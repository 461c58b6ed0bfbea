"""The fields of a recipe by path, those that decide about the experiment apart from the operational ones."""

from collections.abc import Iterator
from typing import Any

from pipeline.recipe.settings_base import Settings


def changed_fields(old: Settings, new: Settings) -> tuple[list[str], list[str]]:
    """Return the fields that differ, as "path: old -> new": first the semantic ones, then the operational ones."""
    before = {path: value for path, value, _ in written_fields(old)}
    after = {path: (value, is_operational) for path, value, is_operational in written_fields(new)}
    semantic, other = [], []
    for path in [*after, *(before.keys() - after.keys())]:
        value, is_operational = after.get(path, (None, False))
        if before.get(path) != value:
            (other if is_operational else semantic).append(f"{path}: {before.get(path)} -> {value}")
    return semantic, other


def written_fields(section: Settings) -> Iterator[tuple[str, Any, bool]]:
    """`leaf_fields` without the fields whose value computes what a recipe without them does."""
    return leaf_fields(section, without_absent=True)


def leaf_fields(section: Settings, prefix: str = "", without_absent: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Yield (path, value, is_operational) of every field, those of nested sections too.

    without_absent: leave out the fields that compute the same as their absence, see `added`.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if without_absent and value in (field.json_schema_extra or {}).get("same_as_absent", ()):
            continue
        if isinstance(value, Settings):
            yield from leaf_fields(value, f"{prefix}{name}.", without_absent)
        else:
            extra = field.json_schema_extra or {}
            yield prefix + name, list(value) if isinstance(value, tuple) else value, bool(extra.get("operational"))
