"""Which classes are taken for which others: accuracy by class, the matrix of few classes, the worst pairs of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.world import World

MATRIX_CLASSES = 20  # more do not fit on a page
OTHER = "a class that the images do not have"


class ClassAccuracy(NamedTuple):
    """The images of a class, and how many of them were answered correctly."""

    name: str
    images: int
    correct: int

    @property
    def percent(self) -> float:
        """100 * correct / images; NaN without images."""
        return 100 * self.correct / self.images if self.images else float("nan")


class ConfusedPair(NamedTuple):
    """How many images of class `name` were taken for class `answer`."""

    name: str
    answer: str
    images: int


@dataclass(frozen=True)
class Confusions:
    """`confused` lists all pairs that occurred, the most frequent first."""

    classes: tuple[ClassAccuracy, ...]
    confused: tuple[ConfusedPair, ...]

    @classmethod
    def of_answers(cls, names: Sequence[str], labels: np.ndarray, answers: np.ndarray) -> "Confusions":
        """Count labels and answers, int64 (images,) each: places in `names`, an answer beyond them is any other."""
        spelled = [*names, OTHER]
        answers = np.where((answers < 0) | (answers >= len(names)), len(names), answers)
        keys, counts = np.unique(labels * len(spelled) + answers, return_counts=True)
        pairs = [(*divmod(int(key), len(spelled)), int(count)) for key, count in zip(keys, counts, strict=True)]
        right = {label: count for label, answer, count in pairs if label == answer}
        images = np.bincount(labels, minlength=len(names)).tolist()
        wrong = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: (-pair[2], *pair))
        return cls(
            tuple(ClassAccuracy(name, images[label], right.get(label, 0)) for label, name in enumerate(names)),
            tuple(ConfusedPair(spelled[label], spelled[answer], count) for label, answer, count in wrong),
        )

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> "Confusions":
        """Rebuild from `json_facts`.

        Raises:
            KeyError, TypeError, ValueError: if the facts are others.
        """
        classes = tuple(
            ClassAccuracy(row["class"], int(row["images"]), int(row["correct"])) for row in facts["per_class"]
        )
        confused = tuple(ConfusedPair(row["class"], row["answer"], int(row["images"])) for row in facts["confused"])
        return cls(classes, confused)

    def json_facts(self) -> dict[str, Any]:
        """`per_class` and `confused` as JSON."""
        return {
            "per_class": [{"class": c.name, "images": c.images, "correct": c.correct} for c in self.classes],
            "confused": [{"class": p.name, "answer": p.answer, "images": p.images} for p in self.confused],
        }

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """What a page shows, as (title, headers, rows): the matrix of few classes, the worst of many."""
        if len(self.classes) <= MATRIX_CLASSES:
            return [self._matrix()]
        images = {row.name: row.images for row in self.classes}
        worst = sorted((row for row in self.classes if row.images), key=lambda row: (row.percent, row.name))
        most = {pair.name: pair for pair in reversed(self.confused)}
        taken = {name: f"{pair.answer} ({pair.images})" for name, pair in most.items()}
        worst_rows = [
            [row.name, str(row.images), f"{row.percent:.1f} %", taken.get(row.name, "")]
            for row in worst[:MATRIX_CLASSES]
        ]
        pair_rows = [
            [pair.name, pair.answer, str(pair.images), f"{100 * pair.images / images[pair.name]:.1f} %"]
            for pair in self.confused[:MATRIX_CLASSES]
        ]
        return [
            (f"The {len(worst_rows)} least accurate of {len(self.classes):,} classes",
             ["class", "images", "accuracy", "most often taken for"], worst_rows),
            (f"The {len(pair_rows)} most confused pairs",
             ["class", "taken for", "images", "of the class"], pair_rows),
        ]  # fmt: skip

    def _matrix(self) -> tuple[str, list[str], list[list[str]]]:
        counts = {(pair.name, pair.answer): pair.images for pair in self.confused}
        counts |= {(row.name, row.name): row.correct for row in self.classes}
        names = [row.name for row in self.classes]
        answers = [*names, *([OTHER] if any(pair.answer == OTHER for pair in self.confused) else [])]
        numbers = [str(number) for number in range(1, len(names) + 1)] + ["other"][: len(answers) - len(names)]
        rows = [
            [f"{number} {row.name}", *(str(counts.get((row.name, answer), 0) or "·") for answer in answers),
             str(row.images), f"{row.percent:.1f} %" if row.images else ""]
            for number, row in enumerate(self.classes, 1)
        ]  # fmt: skip
        title = "Images of each class (rows) by the answer (columns, with the classes' numbers)"
        return title, ["class", *numbers, "images", "accuracy"], rows


class AnswerLog:
    """The label and the answer of every image that this rank has scored."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._answers: list[Tensor] = []

    def add(self, labels: Tensor, answers: Tensor, valid: Tensor) -> None:
        """Add a batch, int64 (N,) each; `valid` bool (N,) says which images count."""
        valid = valid.cpu()
        self._labels.append(labels.cpu()[valid])
        self._answers.append(answers.cpu()[valid])

    def confusions(self, names: Sequence[str], world: World) -> Confusions | None:
        """Count the answers of all ranks; None if no image was added. Collective."""
        if not self._labels:
            return None
        labels, answers = (gather_rows(torch.cat(part), world) for part in (self._labels, self._answers))
        return Confusions.of_answers(names, labels.numpy(), answers.numpy())


def gather_rows(part: Tensor, world: World) -> Tensor:
    """Concatenate the rows of all ranks. Collective."""
    if world.size == 1:
        return part
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(part)]), group=world.group)
    longest = int(max(sizes))
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=world.group)
    return torch.cat([rows[: int(size)] for rows, size in zip(parts, sizes, strict=True)])
