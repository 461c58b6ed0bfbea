"""Where each value of a recipe comes from: the comment at the end of its line, through `extends` and `defaults`.

In the included recipes that comment names the source: `base_lr: 1.5e-4  # paper T8`. A number such as C1 in it refers
to a list of conflicts beside the recipes.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.yaml_files import expand_stages, read_with_bases


@dataclass(frozen=True)
class ValueSource:
    """A place in a file, and what its line says in a comment ("" if nothing)."""

    file: Path | None
    """None is the command line."""
    line: int
    comment: str

    def get(self, key: str, default: Any = None) -> Any:
        """A leaf has no keys; `spread` asks where a value is a mapping."""
        return default


def value_sources(path: Path, overrides: Sequence[str] = ()) -> dict[str, ValueSource]:
    """`stages.STAGE.SECTION.FIELD` -> where its value was given, for every value that a file or override gives.

    Raises:
        RecipeError: as `load`.
    """
    tree = deepcopy(read_with_bases(path, lambda file: _parse(file, file.read_text(encoding="utf-8"))))
    for override in overrides:
        _set(tree, override)
    return dict(_leaves(expand_stages(tree, path)))


@lru_cache(maxsize=64)
def _parse(path: Path, text: str) -> Any:
    """The file's tree, with a Source in place of each value; a null in place of a stage stays one."""
    root, comments = yaml.compose(text), _comments(text)

    def walk(node: yaml.Node, keys: tuple[str, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {key.value: walk(value, (*keys, key.value)) for key, value in node.value}
        if keys == ("extends",):
            return [item.value for item in node.value] if isinstance(node, yaml.SequenceNode) else node.value
        if len(keys) == 2 and keys[0] == "stages" and node.tag == "tag:yaml.org,2002:null":
            return None
        line = node.end_mark.line
        return ValueSource(path, node.start_mark.line + 1, comments.get(line, ""))

    return walk(root, ()) if root else None


def _comments(text: str) -> dict[int, str]:
    """Line -> the comment behind its last token."""
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        ends[token.end_mark.line] = max(ends.get(token.end_mark.line, 0), token.end_mark.column)
    behind = {number: line[ends.get(number, 0) :].strip() for number, line in enumerate(text.splitlines())}
    return {number: rest.lstrip("# ") for number, rest in behind.items() if rest.startswith("#")}


def _set(tree: dict[str, Any], override: str) -> None:
    key, _, value = override.partition("=")
    *parents, last = key.split(".")
    for name in parents:
        below = tree.get(name)
        tree[name] = tree = below if isinstance(below, dict) else {}
    given = yaml.safe_load(value)
    is_null_stage = len(parents) == 1 and parents[0] == "stages" and given is None
    tree[last] = None if is_null_stage else _typed(given)


def _typed(value: Any) -> Any:
    return {k: _typed(v) for k, v in value.items()} if isinstance(value, dict) else ValueSource(None, 0, "")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, ValueSource]]:
    found: list[tuple[str, ValueSource]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, ValueSource):
            found.append((prefix + key, value))
    return found
