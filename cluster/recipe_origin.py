"""The recipe of a run as a person wrote it, in `origin.json` of the run directory.

`recipe.yaml` beside it is resolved and complete, so it does not show what was chosen and what was a default, nor the
reasons in a recipe's comments.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.yaml_files import read_with_bases
from pipeline.storage.folder import write_json
from pipeline.url_secrets import redact

ORIGIN_FILE = "origin.json"


def write_origin(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Record the text of a recipe's file and of those it extends, and the changes on the command line. A later command
    replaces the record."""
    files: dict[Path, str] = {}

    def parse(path: Path) -> Any:
        text = path.read_text()
        files[path] = redact(text)  # a comment may hold a password
        return yaml.safe_load(text) or {}  # a file may hold comments alone

    read_with_bases(recipe, parse)
    listed = [{"path": str(path), "text": text} for path, text in files.items()]
    write_json(run / ORIGIN_FILE, {"recipe": recipe.stem, "overrides": [*map(redact, overrides)], "files": listed})


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` recorded: recipe, overrides, files; empty for a run without a record."""
    path = run / ORIGIN_FILE
    return json.loads(path.read_text()) if path.exists() else {}
