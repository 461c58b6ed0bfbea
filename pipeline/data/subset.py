"""Part of a data file, for runs with few labels: some of its classes, and a share of each class's images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.beton import Beton, samples_of
from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key


@dataclass(frozen=True)
class Subset:
    """The images of a file that take part."""

    samples: int
    ids: np.ndarray | None = None  # int64, ascending: places in the file; None is all of them
    labels: np.ndarray | None = None  # int64: the label here of each label in the file; None keeps them


def count_per_class(beton: Beton, classes: Sequence[str] | None, fraction: float) -> dict[str, int]:
    """Images per class that take part, in the file's order of classes: `fraction` of each, rounded, at least one.

    classes: their names; None is all. Errors: RecipeError for a class that the file does not have.
    """
    chosen = set(beton.classes if classes is None else classes)
    if unknown := sorted(chosen.difference(beton.classes)):
        raise RecipeError(
            f"data.classes: {beton.path.name} has no class {unknown[0]!r}; it has {len(beton.classes)}, such as"
            f" {', '.join(beton.classes[:3])}"
        )
    there = zip(beton.classes, beton.samples_per_class, strict=True)
    return {name: min(max(int(fraction * n + 0.5), 1), n) for name, n in there if name in chosen}


def select_subset(beton: Beton, classes: Sequence[str] | None = None, fraction: float = 1.0, seed: int = 0) -> Subset:
    """The images that take part; labels become places among the classes that are left.

    Which images of a class is a hash of (seed, sample id), so it is the same for any number of ranks, and a smaller
    fraction is part of a larger one. Errors: RecipeError for a class that the file does not have.
    """
    counts = count_per_class(beton, classes, fraction)
    if classes is None and fraction == 1:
        return Subset(beton.samples)
    kept = np.array([name in counts for name in beton.classes])
    labels = samples_of(beton)["f1"]
    ids = np.flatnonzero(kept[labels])
    if fraction < 1:
        labels = labels[ids]
        order = np.lexsort((key(seed, ids, Purpose.SUBSET), labels))
        ids, labels = ids[order], labels[order]
        place_in_class = np.arange(len(ids)) - np.searchsorted(labels, labels)
        quota = np.array([counts.get(name, 0) for name in beton.classes])
        ids = np.sort(ids[place_in_class < quota[labels]])
    assert len(ids) == sum(counts.values()), "the side-car counts other images than the file has"
    return Subset(len(ids), ids, np.where(kept, kept.cumsum() - 1, -1))
