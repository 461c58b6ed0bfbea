"""The images of a data file that take part in a stage: all of them, those with objects, some classes, or a share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.beton import Beton, samples_of
from pipeline.data.objects import Objects
from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key


@dataclass(frozen=True)
class Subset:
    """A data file on this machine, and which of its images take part."""

    beton: Beton
    ids: np.ndarray | None = None  # int64, ascending: the sample ids that take part; None is all
    labels: np.ndarray | None = None  # int64: the new label of each label of the file, -1 if left out; None keeps all
    names: tuple[str, ...] | None = None  # of the new labels, if they are numbered as in another file

    @property
    def samples(self) -> int:
        """How many images take part."""
        return self.beton.samples if self.ids is None else len(self.ids)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that take part; a new label is an index into them."""
        if self.names is not None:
            return self.names
        if self.labels is None:
            return self.beton.classes
        return tuple(name for name, label in zip(self.beton.classes, self.labels, strict=True) if label >= 0)

    @property
    def classes_with_images(self) -> int:
        """How many of the classes have images in the file: as label, or in label maps or among objects."""
        targets = self.beton.objects or self.beton.maps
        images = targets.images if targets else self.beton.samples_per_class
        sizes = zip(self.beton.classes, images, strict=True)
        return len({name for name, count in sizes if count}.intersection(self.classes))

    def numbered_as(self, names: Sequence[str]) -> "Subset":
        """The same images with labels that are numbers of `names`, which hold all classes that take part."""
        if tuple(names) == self.classes:
            return self
        number, part = {name: label for label, name in enumerate(names)}, set(self.classes)
        labels = [number[name] if name in part else -1 for name in self.beton.classes]
        return replace(self, labels=np.array(labels, np.int64), names=tuple(names))


def present_classes(beton: Beton, classes: Sequence[str] | None) -> Sequence[str] | None:
    """Those of the chosen classes that a file has; all of them if it has none, so that the file is refused."""
    if classes is None:
        return None
    return [name for name in classes if name in beton.classes] or classes


def count_per_class(
    beton: Beton, classes: Sequence[str] | None, fraction: float, annotated_only: bool = False
) -> dict[str, int]:
    """Count the images of each class that take part: `fraction` of the class, rounded, at least one.

    Args:
        classes: names of those that take part; None is all. The counts are in the file's order of classes.
        annotated_only: leave out images without objects, if the file has objects; all its images then count as those
            of its first class.

    Raises:
        RecipeError: if the file does not have one of the classes.
    """
    chosen = set(beton.classes if classes is None else classes)
    if unknown := sorted(chosen.difference(beton.classes)):
        raise RecipeError(
            f"data.classes: {beton.path.name} has no class {unknown[0]!r}; it has {len(beton.classes)}, such as"
            f" {', '.join(beton.classes[:3])}"
        )
    sizes = zip(beton.classes, beton.samples_per_class, strict=True)
    if annotated_only and beton.objects is not None:
        sizes = zip(beton.classes, (min(size, beton.objects.annotated) for _, size in sizes), strict=True)
    return {name: min(max(int(fraction * n + 0.5), 1), n) for name, n in sizes if name in chosen}


def select_subset(
    beton: Beton,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    annotated_only: bool = False,
) -> Subset:
    """Select `fraction` of the images of each of the `classes`, and number the classes that are left anew.

    `annotated_only` leaves out the images without objects, if the file has objects. Images are selected by a hash of
    (seed, sample id), so the subset is the same for any number of ranks, and a smaller
    fraction is part of a larger one.

    Raises:
        RecipeError: if the file does not have one of the classes.
    """
    counts = count_per_class(beton, classes, fraction, annotated_only)
    leaves_out = annotated_only and beton.objects is not None and beton.objects.annotated < beton.samples
    if classes is None and fraction == 1 and not leaves_out:
        return Subset(beton)
    kept = np.array([name in counts for name in beton.classes])
    labels = samples_of(beton)["f1"]
    takes_part = kept[labels]
    if leaves_out:
        takes_part &= np.diff(Objects.open(beton).firsts) > 0
    ids = np.flatnonzero(takes_part)
    if fraction < 1:
        labels = labels[ids]
        order = np.lexsort((key(seed, ids, Purpose.SUBSET), labels))
        ids, labels = ids[order], labels[order]
        place_in_class = np.arange(len(ids)) - np.searchsorted(labels, labels)
        quota = np.array([counts.get(name, 0) for name in beton.classes])
        ids = np.sort(ids[place_in_class < quota[labels]])
    assert len(ids) == sum(counts.values()), "the side-car counts other images than the file has"
    return Subset(beton, ids, np.where(kept, kept.cumsum() - 1, -1))
