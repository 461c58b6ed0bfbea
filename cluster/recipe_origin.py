"""What a person asked for, as they wrote it: `origin.json` in the run directory. `recipe.yaml` beside it is complete,
but does not tell what was chosen and what was a default, nor the reasons that stand in a recipe's comments."""

import importlib.resources
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.storage.folder import Folder

ORIGIN = "origin.json"
LIBRARY = Path(str(importlib.resources.files("recipes")))


def write_origin(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Note the recipe's file, those it extends, and the changes on the command line; of several times the last."""
    files = {path: path.read_text() for path in _with_bases(recipe.resolve())}
    listed = [{"path": str(path), "text": text} for path, text in files.items()]
    entry = {"recipe": recipe.stem, "overrides": list(overrides), "files": listed}
    Folder.at(run).publish(ORIGIN, (json.dumps(entry, indent=2) + "\n").encode())


def _with_bases(path: Path) -> Iterator[Path]:
    """The file, then what it extends: beside it, or an included recipe."""
    yield path
    bases = (yaml.safe_load(path.read_text()) or {}).get("extends") or []
    for name in [bases] if isinstance(bases, str) else bases:
        places = (path.parent / name, LIBRARY / name, LIBRARY / f"{name}.yaml")
        if found := next((place for place in places if place.is_file()), None):
            yield from _with_bases(found.resolve())


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` wrote; empty for a run without."""
    path = run / ORIGIN
    return json.loads(path.read_text()) if path.exists() else {}
