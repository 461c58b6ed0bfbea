"""The recipe of a run as a person wrote it, in `origin.json` of the run directory.

`recipe.yaml` beside it is resolved and complete, so it does not show what was chosen and what was a default, nor the
reasons in a recipe's comments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.recipe.yaml_files import read_with_bases
from pipeline.storage.bounded_files import MOST_YAML_BYTES, parse_yaml, read_text
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import name_unreadable, read_record, text_of
from pipeline.url_secrets import redact

ORIGIN_FILE = "origin.json"


def write_origin(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Record the text of a recipe's file and of those it extends, and the changes on the command line. A later command
    replaces the record."""
    files: dict[Path, str] = {}

    def parse(path: Path) -> Any:
        text = read_text(path, MOST_YAML_BYTES)
        files[path] = redact(text)  # a comment may hold a password
        return parse_yaml(text) or {}  # a file may hold comments alone

    read_with_bases(recipe, parse)
    listed = [{"path": str(path), "text": text} for path, text in files.items()]
    write_json(run / ORIGIN_FILE, {"recipe": recipe.stem, "overrides": [*map(redact, overrides)], "files": listed})


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` recorded: recipe, overrides, files; empty for a run without a record that can be read."""
    origin = read_record(run / ORIGIN_FILE)
    if origin and not _is_origin(origin):
        name_unreadable(run / ORIGIN_FILE, "it does not list the files of a recipe")
        return {}
    return origin


def _is_origin(origin: dict[str, Any]) -> bool:
    files, overrides = origin.get("files"), origin.get("overrides")
    return (
        isinstance(origin.get("recipe"), str)
        and isinstance(overrides, list)
        and all(isinstance(text, str) for text in overrides)
        and isinstance(files, list)
        and all(
            isinstance(file, dict) and text_of(file, "path") and isinstance(file.get("text"), str) for file in files
        )
    )
