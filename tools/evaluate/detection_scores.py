"""COCO's figures of a detector: average precision and recall of boxes and masks, and the precision of each class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.objectives.average_precision import FIGURES
from tools.evaluate.region_scores import ROWS

KINDS = ("box", "mask")
TITLES = dict(zip(FIGURES, (
    "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large",
), strict=True))  # fmt: skip


@dataclass(frozen=True)
class DetectionScores:
    """The figures of a data set in percent, and its classes."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    """The annotated objects of each class, without crowds."""
    metrics: dict[str, float]
    """See `AveragePrecision.figures`: box_ap, box_ap50, ..., mask_ap, ...; those that no object counts for are left
    out."""
    of_classes: dict[str, tuple[float | None, ...]]
    """box_ap, and mask_ap where there are masks, of each class; None for a class without objects."""

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> "DetectionScores":
        """Rebuild from `json_facts`.

        Raises:
            KeyError, TypeError, ValueError: if the facts are others.
        """
        rows = [facts["of_classes"][name] for name in map(str, facts["names"])]
        columns = [name for name in ("box_ap", "mask_ap") if all(name in row for row in rows)]
        values = {name: tuple(None if row[name] is None else float(row[name]) for row in rows) for name in columns}
        metrics = {str(name): float(value) for name, value in facts["metrics"].items()}
        return cls(tuple(map(str, facts["names"])), tuple(int(row["objects"]) for row in rows), metrics, values)

    def json_facts(self) -> dict[str, Any]:
        """`names`, `metrics` in percent, and `of_classes`: by name the number of objects, box_ap and mask_ap."""
        rows = {
            name: {"objects": self.counts[n], **{kind: values[n] for kind, values in self.of_classes.items()}}
            for n, name in enumerate(self.names)
        }
        return {"names": list(self.names), "metrics": self.metrics, "of_classes": rows}

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """What a page shows, as (title, headers, rows): all figures, and the classes from the worst on."""
        found = sorted(
            (n for n, value in enumerate(self.of_classes["box_ap"]) if value is not None),
            key=lambda n: (self.of_classes["box_ap"][n], n),
        )
        titles = {"box_ap": "box AP", "mask_ap": "mask AP"}
        rows = [
            [self.names[n], f"{self.counts[n]:,}", *(_shown(values[n]) for values in self.of_classes.values())]
            for n in found[:ROWS]
        ]
        absent = [
            [self.names[n], "no objects", *("" for _ in self.of_classes)]
            for n, value in enumerate(self.of_classes["box_ap"])
            if value is None
        ]
        worst = "" if len(found) <= ROWS else f"The {ROWS} worst of "
        return [
            ("Average precision and recall", *figures_table(self.metrics)),
            (
                f"{worst}{len(found)} {'class' if len(found) == 1 else 'classes'} by box AP",
                ["class", "objects", *(titles[kind] for kind in self.of_classes)],
                rows + absent[:ROWS],
            ),
        ]


def figures_table(metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the figures: a row for each, with a column for boxes and one for masks."""
    kinds = [kind for kind in KINDS if f"{kind}_ap" in metrics]
    rows = [
        [title, *(_shown(metrics.get(f"{kind}_{name}")) for kind in kinds)]
        for name, title in TITLES.items()
        if any(f"{kind}_{name}" in metrics for kind in kinds)
    ]
    return ["figure", *({"box": "boxes", "mask": "masks"}[kind] for kind in kinds)], rows


def difference_of_detectors(own: str, scores: DetectionScores, other: str, others: DetectionScores) -> str:
    """Say in a sentence how much the AP of two detectors on the same images differs."""
    parts = []
    for kind in KINDS:
        first, second = (one.metrics.get(f"{kind}_ap") for one in (scores, others))
        if first is not None and second is not None:
            word = "more" if first >= second else "less"
            parts.append(
                f"{own} has a {kind} AP of {first:.2f} % and {other} {second:.2f} %: {abs(first - second):.2f}"
                f" percentage points {word}"
            )
    return "; ".join(parts)


def _shown(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f} %"
