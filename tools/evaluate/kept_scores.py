"""Keep evaluations of segmenters and detectors in their stage directory, where `fcmae report` finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tools.evaluate.detection_evaluation import DetectionResult
from tools.evaluate.detection_scores import DetectionScores
from tools.evaluate.kept_results import publish_results, read_kept
from tools.evaluate.region_scores import RegionScores
from tools.evaluate.segmentation_evaluation import SegmentationResult

SEGMENTATION, DETECTION = "segmentation", "detection"  # how the files' names begin
Scores = TypeVar("Scores", RegionScores, DetectionScores)


@dataclass(frozen=True)
class KeptScores(Generic[Scores]):
    """What the report needs of an evaluation."""

    subject: str
    weights: str
    data: str
    input: str
    images: int
    scores: Scores


def _read_all(stage: Path, method: str, kind: type[Scores]) -> list[list[KeptScores[Scores]]]:
    def read(facts: dict[str, Any]) -> KeptScores[Scores]:
        words = (str(facts[name]) for name in ("subject", "weights", "data", "input"))
        return KeptScores(*words, int(facts["images"]), kind.of_json(facts))

    return read_kept(stage, method, read)


def kept_segmentations(stage: Path) -> list[list[KeptScores[RegionScores]]]:
    """Read the kept evaluations of a segmenter's stage, see `read_kept`."""
    return _read_all(stage, SEGMENTATION, RegionScores)


def kept_detections(stage: Path) -> list[list[KeptScores[DetectionScores]]]:
    """Read the kept evaluations of a detector's stage, see `read_kept`."""
    return _read_all(stage, DETECTION, DetectionScores)


def segmentation_result_facts(result: SegmentationResult) -> dict[str, Any]:
    """The result for JSON: what was evaluated, metrics in percent, IoU by class and the matrix of pixels."""
    how = result.how
    test = {"test": how.test, "scales": list(how.scales), "flip": how.flip}
    return _facts(result, test) | {"metrics": result.scores.metrics, **result.scores.json_facts()}


def detection_result_facts(result: DetectionResult) -> dict[str, Any]:
    """The result for JSON: what was evaluated, the figures in percent, and those of each class."""
    return _facts(result, {"test": result.test}) | result.scores.json_facts()


def _facts(result: SegmentationResult | DetectionResult, test: dict[str, Any]) -> dict[str, Any]:
    return {
        "subject": result.subject, "weights": result.weights, "data": result.data, "data_sha256": result.data_sha256,
        "input": result.input, **test, "precision": result.precision, "images": result.images,
    }  # fmt: skip


def keep_segmentations(results: Sequence[SegmentationResult]) -> Path | None:
    """Write the results into the stage of the first one, see `publish_results`; the method is the test."""
    how = results[0].how
    scales = "-".join(f"{scale:g}" for scale in how.scales)
    method = "-".join((SEGMENTATION, how.test, scales, *["flip"] * how.flip))
    return publish_results(results[0], method, list(map(segmentation_result_facts, results)))


def keep_detections(results: Sequence[DetectionResult]) -> Path | None:
    """Write the results into the stage of the first one, see `publish_results`; the method is the test."""
    return publish_results(results[0], f"{DETECTION}-{results[0].test}", list(map(detection_result_facts, results)))
