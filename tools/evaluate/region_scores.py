"""How well label maps agree with the truth: mIoU, IoU by class, and which classes are taken for which, from pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 20  # of a table on a page


@dataclass(frozen=True)
class RegionScores:
    """`matrix[t, p]` counts the pixels of class t that were taken for class p, int64 (classes, classes)."""

    names: tuple[str, ...]
    matrix: NDArray[np.int64]

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> "RegionScores":
        """Rebuild from `json_facts`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if the facts are others.
        """
        names, matrix = tuple(map(str, facts["names"])), np.array(facts["matrix"], np.int64)
        if matrix.shape != (len(names), len(names)) or (matrix < 0).any():
            raise ValueError(f"a matrix of shape {matrix.shape} for {len(names)} classes")
        return cls(names, matrix)

    def json_facts(self) -> dict[str, Any]:
        """`names`, `matrix`, and `iou` in percent by class, None for a class without pixels."""
        iou = {name: None if np.isnan(v) else v for name, v in zip(self.names, self.iou.tolist(), strict=True)}
        return {"names": list(self.names), "matrix": self.matrix.tolist(), "iou": iou}

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class in percent; NaN where neither truth nor prediction has a pixel."""
        right = np.diagonal(self.matrix)
        return _percent(right, self.matrix.sum(0) + self.matrix.sum(1) - right)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """The share of each class's pixels that were found, in percent; NaN for a class without pixels."""
        return _percent(np.diagonal(self.matrix), self.matrix.sum(1))

    @property
    def metrics(self) -> dict[str, float]:
        """mIoU and mean accuracy of the classes that occur, and accuracy of all pixels, in percent."""
        pixels = _percent(np.trace(self.matrix), self.matrix.sum())
        return {"miou": _mean(self.iou), "mean_accuracy": _mean(self.accuracy), "pixel_accuracy": float(pixels)}

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """What a page shows, as (title, headers, rows): the classes from the worst on, and the most confused pairs."""
        iou, accuracy, pixels = self.iou, self.accuracy, self.matrix.sum(1)
        share = _percent(pixels, pixels.sum())
        found = [n for n in np.argsort(iou, kind="stable").tolist() if not np.isnan(iou[n])]
        classes = [
            [self.names[n], f"{share[n]:.2f} %", f"{iou[n]:.2f} %", _shown(accuracy[n]), self._taken_for(n)]
            for n in found[:ROWS]
        ]
        absent = [
            [name, "no pixels", "", "", ""] for name, value in zip(self.names, iou, strict=True) if np.isnan(value)
        ]
        wrong = self.matrix * ~np.eye(len(self.names), dtype=bool)
        order = np.argsort(-wrong, axis=None, kind="stable")[:ROWS]
        pairs = [(*divmod(int(place), len(self.names)), int(wrong.flat[place])) for place in order]
        rows = [
            [self.names[t], self.names[p], f"{count:,}", f"{100 * count / pixels[t]:.1f} %"]
            for t, p, count in pairs
            if count
        ]
        worst = "" if len(found) <= ROWS else f"The {ROWS} worst of "
        return [
            (
                f"{worst}{len(found)} {'class' if len(found) == 1 else 'classes'} by IoU",
                ["class", "of all pixels", "IoU", "accuracy", "taken for"],
                classes + absent[:ROWS],
            ),
            ("Most confused classes", ["class", "taken for", "pixels", "of the class"], rows),
        ]

    def _taken_for(self, number: int) -> str:
        """The class that most of a class's other pixels were taken for."""
        wrong = np.where(np.arange(len(self.names)) == number, 0, self.matrix[number])
        most = int(wrong.argmax())
        return f"{self.names[most]} ({100 * wrong[most] / self.matrix[number].sum():.1f} %)" if wrong[most] else ""


def count_pixels(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Count the pixels of each (class, predicted class): (classes, classes). Truths from `classes` on are ignored."""
    known = truth < classes
    places = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)


def difference_of_scores(own: str, scores: RegionScores, other: str, others: RegionScores) -> str:
    """Say in a sentence how much the mIoU of two kinds of weights on the same images differs."""
    first, second = scores.metrics["miou"], others.metrics["miou"]
    word = "more" if first >= second else "less"
    return (
        f"{own} has an mIoU of {first:.2f} % and {other} {second:.2f} %: {abs(first - second):.2f} percentage points"
        f" {word}"
    )


def _percent(part: Any, whole: Any) -> NDArray[np.float64]:
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(100 * part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _shown(percent: float) -> str:
    return "" if np.isnan(percent) else f"{percent:.2f} %"
