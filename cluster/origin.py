"""What a person asked for, as they wrote it: `origin.json` in the run directory. `recipe.yaml` beside it is complete,
but does not tell what was chosen and what was a default, nor the reasons that stand in a recipe's comments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.folder import Folder

ORIGIN = "origin.json"


def write_origin(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Note the recipe's file, those it extends, and the changes on the command line; of several times the last."""
    files: list[dict[str, str]] = []
    path: Path | None = recipe.resolve()
    while path is not None and str(path) not in [file["path"] for file in files]:
        text = path.read_text()
        files.append({"path": str(path), "text": text})
        base = (yaml.safe_load(text) or {}).get("extends")
        path = (path.parent / base).resolve() if isinstance(base, str) else None
    entry = {"recipe": recipe.stem, "overrides": list(overrides), "files": files}
    Folder.at(run).publish(ORIGIN, (json.dumps(entry, indent=2) + "\n").encode())


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` wrote; empty for a run without."""
    path = run / ORIGIN
    return json.loads(path.read_text()) if path.exists() else {}
