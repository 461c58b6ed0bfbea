"""What `fcmae evaluate` found out about a stage's weights: accuracy beside other weights', by class, and confusions."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.errors import counted
from tools.evaluate.confusions import MATRIX_CLASSES, Confusions
from tools.evaluate.detection_scores import DetectionScores, difference_of_detectors, figures_table
from tools.evaluate.kept_results import KeptResult, difference_of, kept_results
from tools.evaluate.kept_scores import KeptScores, kept_detections, kept_segmentations
from tools.evaluate.region_scores import RegionScores, difference_of_scores
from tools.report.document import Block, Fold, Grid, Text, Toned
from tools.report.facts import StageFacts

AP_COLUMNS = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}


def evaluation_blocks(stage: StageFacts) -> Iterator[Block]:
    """The kept evaluations of a stage; how to make one if a classifier has none."""
    kept = kept_results(stage.directory)
    if not kept and stage.done and "top1" in stage.metrics:
        yield Text(
            "After `fcmae evaluate RUN --data IMAGES.beton` the accuracy by class is shown here, and after the same"
            " with --knn TRAIN.beton --beside WEIGHTS what the pre-training is worth.",
            quiet=True,
        )
    for results in kept:
        yield from _one_evaluation(results)
    segmentations = kept_segmentations(stage.directory)
    if not segmentations and stage.done and "miou" in stage.metrics:
        yield Text(
            "After `fcmae evaluate RUN --data IMAGES.beton` the IoU by class and the classes' confusions are shown"
            " here.",
            quiet=True,
        )
    for results in segmentations:
        yield from _one_segmentation(results)
    detections = kept_detections(stage.directory)
    if not detections and "box_ap" in stage.metrics:
        yield Text("Average precision and recall at the last evaluation:")
        yield _figures_grid(stage.metrics)
        if stage.done:
            yield Text("After `fcmae evaluate RUN --data IMAGES.beton` the AP by class is shown here.", quiet=True)
    for results in detections:
        yield from _one_detection(results)


def _one_evaluation(results: Sequence[KeptResult]) -> Iterator[Block]:
    own, *others = results
    how = f"by the nearest neighbours in {own.neighbours_of}" if own.neighbours_of else "by the head"
    how = "; ".join((how, *own.conditions))
    yield Text(f"Evaluated on {counted(own.images, 'image')} of {own.data}, {own.input}, {how}:")
    rows = [[r.subject, r.weights, f"{r.top1:.2f} %", f"{r.top5:.2f} %", _gain(own, r)] for r in results]
    headers = ["weights", "of the file", "top-1", "top-5", "difference in top-1"]
    yield Grid(headers, rows, headers[2:])
    yield from (Text(f"{difference_of(own, other)}.") for other in others)
    if own.confusions is not None:
        yield from _confusion_blocks(own.confusions)


def _one_segmentation(results: Sequence[KeptScores[RegionScores]]) -> Iterator[Block]:
    own, *others = results
    yield Text(f"Evaluated on {counted(own.images, 'image')} of {own.data}, {own.input}:")
    rows = [[r.subject, r.weights, *(f"{value:.2f} %" for value in r.scores.metrics.values())] for r in results]
    headers = ["weights", "of the file", "mIoU", "mean accuracy", "pixel accuracy"]
    yield Grid(headers, rows, headers[2:])
    for other in others:
        yield Text(f"{difference_of_scores(own.subject, own.scores, other.subject, other.scores)}.")
    whose = f", {own.subject}" if others else ""
    for title, headers, rows in own.scores.tables():
        yield Text(f"{title}{whose}:")
        yield Grid(headers, rows, [header for header in headers[1:] if header != "taken for"])


def _one_detection(results: Sequence[KeptScores[DetectionScores]]) -> Iterator[Block]:
    own, *others = results
    yield Text(f"Evaluated on {counted(own.images, 'image')} of {own.data}, {own.input}:")
    if others:
        rows = [[r.subject, r.weights, *(_points(r.scores.metrics, name) for name in AP_COLUMNS)] for r in results]
        yield Grid(["weights", "of the file", *AP_COLUMNS.values()], rows, list(AP_COLUMNS.values()))
    for other in others:
        yield Text(f"{difference_of_detectors(own.subject, own.scores, other.subject, other.scores)}.")
    whose = f", {own.subject}" if others else ""
    for title, headers, rows in own.scores.tables():
        yield Text(f"{title}{whose}:")
        yield Grid(headers, rows, headers[1:])


def _figures_grid(metrics: Mapping[str, float]) -> Grid:
    headers, rows = figures_table(metrics)
    return Grid(headers, rows, headers[1:])


def _points(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.2f} %" if name in metrics else ""


def _gain(own: KeptResult, other: KeptResult) -> str:
    return "" if other is own else f"{other.top1 - own.top1:+.2f}"


def _confusion_blocks(confusions: Confusions) -> Iterator[Block]:
    """The matrix of few classes; of many the worst, and all of them in a fold."""
    few = len(confusions.classes) <= MATRIX_CLASSES
    for title, headers, rows in confusions.tables():
        yield Text(f"{title}:")
        numbers = [header for header in headers[1:] if header != "most often taken for" and header != "taken for"]
        cells = [[_right(cell, place, number) if few else cell for place, cell in enumerate(row)]
                 for number, row in enumerate(rows, 1)]  # fmt: skip
        yield Grid(headers, cells, numbers)
    if not few:
        rows = [[c.name, f"{c.images:,}", f"{c.percent:.1f} %" if c.images else ""] for c in confusions.classes]
        headers = ["class", "images", "accuracy"]
        yield Fold(f"accuracy of all {len(rows):,} classes", [Grid(headers, rows, headers[1:])])


def _right(cell: str, place: int, number: int) -> str | Toned:
    """Mark the diagonal, which counts correct answers."""
    return Toned(cell, "good") if place == number else cell
