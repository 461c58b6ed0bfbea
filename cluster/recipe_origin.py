"""The recipe of a run as a person wrote it, in `origin.json` of the run directory.

`recipe.yaml` beside it is resolved and complete, so it does not show what was chosen and what was a default, nor the
reasons in a recipe's comments.
"""

import importlib.resources
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.storage.folder import write_json

ORIGIN_FILE = "origin.json"
LIBRARY = Path(str(importlib.resources.files("recipes")))


def write_origin(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Record the text of a recipe's file and of those it extends, and the changes on the command line. A later command
    replaces the record."""
    files = {path: path.read_text() for path in _with_bases(recipe.resolve())}
    listed = [{"path": str(path), "text": text} for path, text in files.items()]
    write_json(run / ORIGIN_FILE, {"recipe": recipe.stem, "overrides": list(overrides), "files": listed})


def _with_bases(path: Path) -> Iterator[Path]:
    """A recipe's file, then those it extends: files beside it, or included recipes."""
    yield path
    bases = (yaml.safe_load(path.read_text()) or {}).get("extends") or []
    for name in [bases] if isinstance(bases, str) else bases:
        candidates = (path.parent / name, LIBRARY / name, LIBRARY / f"{name}.yaml")
        if base := next((candidate for candidate in candidates if candidate.is_file()), None):
            yield from _with_bases(base.resolve())


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` recorded: recipe, overrides, files; empty for a run without a record."""
    path = run / ORIGIN_FILE
    return json.loads(path.read_text()) if path.exists() else {}
