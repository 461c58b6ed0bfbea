"""Average precision of detections on COCO's terms: 12 figures for boxes and 12 for masks, by pycocotools."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.data.image_objects import ImageObjects
from pipeline.data.objects import Objects

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""In the order of pycocotools, behind "box_" and "mask_"."""
KINDS = {"box": "bbox", "mask": "segm"}
_GRID = (10, 101, 4, 3)  # thresholds of overlap, of recall, ranges of area, most detections of an image


class AveragePrecision(NamedTuple):
    """The figures of a data set in percent; those that no object counts for are missing."""

    figures: dict[str, float]
    """`box_ap` first, then the others: `FIGURES` behind "box_", and "mask_" where there are masks."""
    of_classes: dict[str, list[float | None]]
    """`box_ap`, and `mask_ap`, of each class; None for a class without objects."""


def average_precision(
    objects: Objects, samples: Sequence[int], detected: Sequence[ImageObjects], masks: bool
) -> AveragePrecision:
    """Compare detections with the annotated objects of a data file.

    Args:
        objects: of the whole file.
        samples: the images that were examined, by their places in the file.
        detected: what was detected in each of them, in pixels of the original image.
        masks: whether masks are compared too.
    """
    classes = range(len(objects.category_ids))
    return summarise(compare_classes(objects, samples, detected, classes, masks), masks)


def compare_classes(
    objects: Objects, samples: Sequence[int], detected: Sequence[ImageObjects], classes: Sequence[int], masks: bool
) -> np.ndarray:
    """Return precision and recall of some classes: float64 (kinds, 10, 101 + 1, classes, 4, 3); -1 without objects.

    Ranks can share the classes: the tables of all classes, in order, are what `summarise` takes.
    """
    kinds = ("box", "mask") if masks else ("box",)
    thresholds, recalls, areas, most = _GRID
    tables = -np.ones((len(kinds), thresholds, recalls + 1, len(classes), areas, most))
    for table, kind in zip(tables, kinds, strict=True) if len(classes) else ():
        evaluation = _evaluation(kind)
        evaluation.params.imgIds = [objects.image_id(sample) for sample in samples]
        _enter(evaluation, objects, zip(samples, detected, strict=True), set(classes), kind)
        for place, number in enumerate(classes):  # one at a time, because a comparison is much larger than its result
            evaluation.params.catIds = [number]
            evaluation.evaluate()
            evaluation.accumulate()
            table[:, :-1, place : place + 1] = evaluation.eval["precision"]
            table[:, -1, place : place + 1] = evaluation.eval["recall"]
    return tables


def summarise(tables: np.ndarray, masks: bool) -> AveragePrecision:
    """Turn the tables of all classes into the figures of the whole set and of each class."""
    figures, of_classes = {}, {}
    for table, kind in zip(tables, ("box", "mask") if masks else ("box",), strict=True):
        evaluation = _evaluation(kind)
        evaluation.eval = {"precision": table[:, :-1], "recall": table[:, -1]}
        evaluation.summarize()
        known = zip(FIGURES, evaluation.stats.tolist(), strict=True)
        figures |= {f"{kind}_{name}": 100 * value for name, value in known if value > -1}
        each = (precision[precision > -1] for precision in np.moveaxis(table[:, :-1, :, 0, -1], 2, 0))
        of_classes[f"{kind}_ap"] = [100 * float(own.mean()) if own.size else None for own in each]
    return AveragePrecision(figures, of_classes)


def _evaluation(kind: str) -> "COCOeval":
    """An evaluation of pycocotools whose objects are entered by `_enter`, instead of read from JSON."""
    from pycocotools import cocoeval

    # It prints its progress. Redirecting stdout would also catch what other threads print.
    cocoeval.print = lambda *words: None

    class Evaluation(cocoeval.COCOeval):
        def _prepare(self) -> None:
            """Keep the objects that were entered."""

    return Evaluation(iouType=KINDS[kind])


def _enter(evaluation: "COCOeval", objects: Objects, images: Any, own: set[int], kind: str) -> None:
    """Enter annotated objects and detections of some classes; ids count from 1, because 0 means unmatched."""
    from pycocotools import mask as coco_mask

    truths, results = 0, 0
    for sample, detected in images:
        image = objects.image_id(sample)
        for row in objects.rows(sample):
            if (number := int(row["class"])) in own:
                truths, crowd = truths + 1, int(row["crowd"])
                place = objects.mask(row) if kind == "mask" else row["box"].tolist()
                entry = {"id": truths, "area": float(row["area"]), "iscrowd": crowd, "ignore": crowd}
                evaluation._gts[image, number].append({**entry, _field(kind): place})
        chosen = [n for n, number in enumerate(detected.classes.tolist()) if number in own]
        if kind == "mask":
            places = [detected.masks[n] for n in chosen]
            areas = coco_mask.area(places).tolist() if places else []
        else:
            places = coco_boxes(detected.boxes[chosen]).tolist()
            areas = [width * height for _, _, width, height in places]
        for n, place, area in zip(chosen, places, areas, strict=True):
            results += 1
            entry = {"id": results, "area": area, "score": float(detected.scores[n])}
            evaluation._dts[image, int(detected.classes[n])].append({**entry, _field(kind): place})


def _field(kind: str) -> str:
    return "segmentation" if kind == "mask" else "bbox"


def coco_boxes(boxes: np.ndarray) -> np.ndarray:
    """Turn boxes (n, 4) of x1, y1, x2, y2 into COCO's x, y, width and height, in float64."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
