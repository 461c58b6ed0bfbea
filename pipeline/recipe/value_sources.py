"""Find the file and line of each value of a recipe, and the comment at the end of the line.

In the included recipes the comment names the source of the value: `base_lr: 1.5e-4  # paper T8`. A number such as C1
in it refers to `conflicts.yaml` beside the recipes.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.yaml_files import expand_stages, read_with_bases
from pipeline.storage.bounded_files import MOST_YAML_BYTES, parse_yaml, read_text


@dataclass(frozen=True)
class ValueSource:
    """The place of a value in a file, and the comment on its line, "" without one."""

    file: Path | None
    """None for a value from the command line."""
    line: int
    comment: str


def value_sources(path: Path, overrides: Sequence[str] = ()) -> dict[str, ValueSource]:
    """Return the source of every value that a file or an override sets, by `stages.STAGE.SECTION.FIELD`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    tree = deepcopy(read_with_bases(path, lambda file: _parse(file, read_text(file, MOST_YAML_BYTES))))
    for override in overrides:
        _set(tree, override)
    return dict(_leaves(expand_stages(tree, path)))


@lru_cache(maxsize=64)
def _parse(path: Path, text: str) -> Any:
    """Return the file's tree with a ValueSource in place of each value, except for a null in place of a stage."""
    parse_yaml(text)  # refuses what would be too deep or too long here
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
    """Return the comment behind the last token of each line, by line number from 0."""
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
    new = parse_yaml(value)
    is_null_stage = len(parents) == 1 and parents[0] == "stages" and new is None
    tree[last] = None if is_null_stage else _from_command_line(new)


def _from_command_line(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_command_line(below) for name, below in value.items()}
    return ValueSource(None, 0, "")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, ValueSource]]:
    leaves: list[tuple[str, ValueSource]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, ValueSource):
            leaves.append((prefix + key, value))
    return leaves
