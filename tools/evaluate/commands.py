"""`fcmae evaluate`: measure trained weights on prepared images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from tools.options import (
    ChannelAdaptation,
    FlipOption,
    Json,
    NMSOption,
    Processes,
    Refresh,
    ScaleOption,
    ScoreThresholdOption,
    SoftNMSOption,
    TestOption,
    file_option,
    image_size_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.evaluate.detection_evaluation import DetectionResult
    from tools.evaluate.run_evaluation import EvaluationResult
    from tools.evaluate.segmentation_evaluation import SegmentationResult

# Columns that are flush right.
NUMBERS = (
    "images",
    "accuracy",
    "of the class",
    "other",
    "of all pixels",
    "IoU",
    "pixels",
    "objects",
    "boxes",
    "masks",
    "box AP",
    "mask AP",
)


def evaluate_weights(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS",
        help="A weights file that `fcmae convert` reads, a stage, or a run.")],
    data: Annotated[str, file_option("The images: a folder or archive of CLASS/IMAGE files, or a .beton file.")],
    image_size: Annotated[Any, image_size_option(
        "Side of the input images. Default: that of the stage or the file, or 224.")] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(min=0.1, max=1, help="Side of the centre crop divided by that of the resized image; 1 squashes all"
                     " of the image to a square. Default: the stage's, or 0.875, or 1 from 384 pixels on."),
    ] = None,
    ema: Annotated[bool | None, typer.Option("--ema/--raw",
        help="Where both exist: the moving average, or the raw weights.")] = None,
    nproc: Processes = 1,
    channels: ChannelAdaptation = None,
    classes: Annotated[str | None, file_option(
        "Class names of the outputs, if WEIGHTS lacks them: lines, JSON list, or .beton file.")] = None,
    real: Annotated[str | None, file_option(
        "ImageNet-ReaL's real.json: use its labels. Needs all validation images, in order.")] = None,
    knn: Annotated[str | None, file_option(
        "Training images, given like --data: let the 20 nearest vote, instead of the head.")] = None,
    all_outputs: Annotated[bool, typer.Option("--all-outputs",
        help="Also allow answers that are no class of the images.")] = False,
    benchmark: Annotated[Literal["val", "v2", "a", "r", "sketch", "c"] | None, typer.Option(
        help="The ImageNet test set in --data, to compare results. Default: val if it has 50,000 images. c: a folder of"
             " CORRUPTION/SEVERITY folders, and the mean corruption error.")] = None,
    chain: Annotated[Literal["in1k", "in22k_in1k"] | None, typer.Option(
        help="Compare only with published weights trained on ImageNet-1K, or on 22K and then 1K.")] = None,
    batch: Annotated[int | None, typer.Option(min=1,
        help="Images in a batch of each process. Default: 64; windows of a segmenter as the recipe evaluates.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast) instead of fp32.")] = False,
    per_class: Annotated[bool, typer.Option("--per-class",
        help="Also print the confusion matrix, or all figures of a detector; of over 20 classes the worst.")] = False,
    beside: Annotated[list[str] | None, typer.Option("--beside", metavar="WEIGHTS",
        help="Measure these weights on the same images too, and say the difference. May be repeated.")] = None,
    test: TestOption = None,
    scale: ScaleOption = None,
    flip: FlipOption = False,
    score_threshold: ScoreThresholdOption = None,
    nms: NMSOption = None,
    soft_nms: SoftNMSOption = None,
    results: Annotated[Path | None, typer.Option(metavar="FILE.json",
        help="Of a detector: also write what it finds as COCO's results, which pycocotools' loadRes reads.")] = None,
    refresh: Refresh = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Measure weights on images: top-1 and top-5 of a classifier, mIoU of a segmenter, COCO's AP of a detector.

    A segmenter needs images with label maps, a .beton file of `fcmae prepare maps`; a detector images with objects, a
    .beton file of `fcmae prepare coco`. Where a result for such weights is published, the difference is printed.

    Results with weights of a run or a stage are kept in its directory for `fcmae report`.
    """
    import json as json_library
    import sys
    from dataclasses import replace

    from pipeline.errors import UserError
    from tools.evaluate.evaluated_data import (
        evaluated_files,
        note_other_window,
        note_training_images,
        refuse_missing_file,
    )
    from tools.evaluate.kept_results import keep_results
    from tools.evaluate.published import compare_with_published, result_facts
    from tools.evaluate.run_evaluation import BATCH, EvaluationRequest, run_evaluation
    from tools.evaluate.training_precision import precision_notes
    from tools.predict.model_kinds import kind_of, refuse_options
    from tools.prepare.prepared_cache import is_source

    kind = kind_of(weights)
    refuse_options(weights, kind, {
        ("classifier",): {"--image-size": image_size, "--crop-pct": crop_pct, "--channels": channels,
            "--classes": classes, "--real": real, "--knn": knn, "--all-outputs": all_outputs,
            "--benchmark": benchmark, "--chain": chain, "--refresh": refresh},
        ("segmenter",): {"--test": test, "--scale": scale, "--flip": flip},
        ("detector",): {"--score-threshold": score_threshold, "--nms": nms, "--soft-nms": soft_nms,
            "--results": results},
        ("classifier", "segmenter"): {"--batch": batch},
    })  # fmt: skip
    if benchmark != "c" and (beside or is_source(data) or (knn and is_source(knn))):
        _check_weights(kind, (weights, *(beside or ())))
    shown = {"per_class": per_class, "json": json}
    if data.endswith(".beton"):
        refuse_missing_file(data, kind)
        note_other_window(weights, data)
        if kind != "classifier":
            note_training_images(weights, data, data)
    if kind == "segmenter":
        settings = {"ema": ema, "test": test, "scales": scale, "flip": flip, "batch": batch, "bf16": bf16}
        _evaluate_segmenter([weights, *(beside or ())], data, settings, nproc, **shown)
        return
    if kind == "detector":
        settings = {"ema": ema, "score_threshold": score_threshold, "nms": nms, "soft_nms": soft_nms, "bf16": bf16}
        _evaluate_detector([weights, *(beside or ())], data, settings, nproc, results, **shown)
        return
    batch = batch or BATCH
    if benchmark == "c":
        others = {"--real": real, "--knn": knn, "--chain": chain, "--per-class": per_class, "--beside": beside}
        for name in (name for name, value in others.items() if value):
            raise UserError(f"--benchmark c has no {name}; leave it out")
        # Its images have the size of the network's input, so nothing is cropped.
        settings = {"image_size": image_size, "crop_pct": crop_pct or 1.0, "ema": ema, "channels": channels,
            "classes": classes, "all_outputs": all_outputs, "batch": batch, "bf16": bf16}  # fmt: skip
        _evaluate_corruptions(weights, data, settings, nproc, refresh, json)
        return
    if real and knn:
        raise UserError(f"--real {real} judges the head's answers, and with --knn neighbours answer; leave one out")
    file, voters = evaluated_files(weights, data, knn, refresh)
    request = EvaluationRequest(
        weights, file, image_size=image_size, crop_pct=crop_pct, ema=ema, channels=channels, classes=classes,
        real=real, knn=voters, all_outputs=all_outputs, batch=batch, bf16=bf16,
    )  # fmt: skip
    results = [run_evaluation(request, nproc)]
    own = {"image_size": results[0].image_size, "crop_pct": results[0].crop_pct, "ema": None, "classes": None}
    results += [run_evaluation(replace(request, weights=other, **own), nproc) for other in beside or ()]
    results = [replace(result, data=data, neighbours_of=knn) for result in results]
    benchmark = "real" if real else benchmark
    comparisons = [[] if knn else compare_with_published(result, benchmark, chain) for result in results]
    kept = keep_results(results)
    if kept is not None:
        print(f"kept for the report: {kept}", file=sys.stderr)
    if json:
        facts = [result_facts(result, compared) for result, compared in zip(results, comparisons, strict=True)]
        print(json_library.dumps(facts if beside else facts[0], indent=2))
        return
    for result, compared in zip(results, comparisons, strict=True):
        print(result, *compared, *precision_notes(result), sep="\n")
        if per_class and result.confusions:
            _print_tables(result.confusions.tables())
    _print_differences(results)


def _check_weights(kind: str, names: "Sequence[str]") -> None:
    """Refuse weights that cannot be read or are of another kind now, and not after hours of preparing or measuring."""
    from pipeline.errors import UserError
    from tools.predict.model_kinds import kind_of
    from tools.weights.model import open_weights

    for name in names:
        if (other := kind_of(name)) != kind:
            raise UserError(f"--beside {name} is a {other}, and {names[0]} a {kind}; name weights of one kind")
        open_weights(name)


def _evaluate_segmenter(
    weights: list[str], data: str, settings: dict[str, Any], nproc: int, *, per_class: bool, json: bool
) -> None:
    from tools.evaluate.kept_scores import keep_segmentations, segmentation_result_facts
    from tools.evaluate.published import published_miou
    from tools.evaluate.region_scores import difference_of_scores
    from tools.evaluate.segmentation_evaluation import SegmentationRequest, evaluate_segmenter

    results = [evaluate_segmenter(SegmentationRequest(name, data, **settings), nproc) for name in weights]
    kept, facts = keep_segmentations(results), list(map(segmentation_result_facts, results))
    published = list(map(published_miou, results))
    _present(results, kept, facts, published, difference_of_scores, per_class=per_class, json=json)


def _evaluate_detector(
    weights: list[str],
    data: str,
    settings: dict[str, Any],
    nproc: int,
    written: Path | None,
    *,
    per_class: bool,
    json: bool,
) -> None:
    from tools.evaluate.detection_evaluation import DetectionRequest, evaluate_detector
    from tools.evaluate.detection_scores import difference_of_detectors
    from tools.evaluate.kept_scores import detection_result_facts, keep_detections
    from tools.evaluate.published import published_ap

    results = [
        evaluate_detector(DetectionRequest(name, data, **settings, results=None if number else written), nproc)
        for number, name in enumerate(weights)
    ]
    kept, facts = keep_detections(results), list(map(detection_result_facts, results))
    _present(results, kept, facts, list(map(published_ap, results)), difference_of_detectors,
        per_class=per_class, json=json)  # fmt: skip


def _present(
    results: "Sequence[SegmentationResult | DetectionResult]",
    kept: Path | None,
    facts: list[dict[str, Any]],
    published: list[list[str]],
    difference: "Callable[..., str]",
    *,
    per_class: bool,
    json: bool,
) -> None:
    """Print results of segmenters or of detectors, the first one's with its difference to the others."""
    import json as json_library
    import sys

    from tools.evaluate.training_precision import precision_notes

    if kept is not None:
        print(f"kept for the report: {kept}", file=sys.stderr)
    if json:
        print(json_library.dumps(facts if len(facts) > 1 else facts[0], indent=2))
        return
    for result, lines in zip(results, published, strict=True):
        print(result, *lines, *precision_notes(result), sep="\n")
        if per_class:
            _print_tables(result.scores.tables())
    own, *others = results
    for other in others:
        print(difference(own.subject, own.scores, other.subject, other.scores))


def _evaluate_corruptions(
    weights: str, data: str, settings: dict[str, Any], nproc: int, refresh: bool, json: bool
) -> None:
    import json as json_library

    from tools.evaluate.corruptions import SEVERITIES, measure_corruptions
    from tools.evaluate.evaluated_data import evaluated_files
    from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
    from tools.tables import plain_table, wide_console

    def top1_of(place: Path) -> float:
        file, _ = evaluated_files(weights, str(place), None, refresh)
        return run_evaluation(EvaluationRequest(weights, file, **settings), nproc).metrics["top1"]

    found = measure_corruptions(data, top1_of)
    if json:
        print(json_library.dumps({**found.summary(), "errors": found.errors}, indent=2))
        return
    headers = ("corruption", *SEVERITIES, "mean", "AlexNet's", "ratio")
    table = plain_table(*headers, right=headers[1:])
    for row in found.rows():
        table.add_row(*row)
    wide_console().print(table)
    for name, value in found.summary().items():
        print(f"{name.replace('_', ' ')}: {value:.2f} %")
    if not found.is_whole:
        print("The mean corruption error wants all fifteen corruptions at five severities.")


def _print_tables(tables: "Sequence[tuple[str, list[str], list[list[str]]]]") -> None:
    from tools.tables import plain_table, wide_console

    console = wide_console()
    for title, headers, rows in tables:
        table = plain_table(*headers, right=[header for header in headers if header[0].isdigit() or header in NUMBERS])
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(f"\n{title}:")
        console.print(table)


def _print_differences(results: "list[EvaluationResult]") -> None:
    from tools.evaluate.kept_results import KeptResult, difference_of
    from tools.evaluate.published import result_facts

    own, *others = (KeptResult.of_facts(result_facts(result)) for result in results)
    for other in others:
        print(difference_of(own, other))
