"""Keep traces in the user's cache, because a trace of a large model takes seconds and never changes."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pipeline.recipe import StageRecipe
from pipeline.storage.user_cache import user_cache

PATHS = {"data": {"train", "validation"}}  # of a recipe; a trace does not depend on them


def kept(
    kind: str, recipe: StageRecipe, device: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return what `compute` returned for an equal recipe before, or call it and keep the result.

    Args:
        kind: what is computed, for a name of its own in the cache.
    """
    words = (kind, device, torch.__version__, _sources(), recipe.model_dump_json(exclude=PATHS))
    path = user_cache() / "traces" / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # not there, or damaged: zip, zlib and numpy each have errors of their own
        arrays = compute()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
    return arrays


@cache
def _sources() -> str:
    """A hash of our code, which decides what a trace holds."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
