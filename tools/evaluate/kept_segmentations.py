"""Keep evaluations of a segmenter in its stage directory, where `fcmae report` finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.evaluate.kept_results import publish_results, read_kept
from tools.evaluate.region_scores import RegionScores
from tools.evaluate.segmentation_evaluation import SegmentationResult

METHOD = "segmentation"  # how the files' names begin


@dataclass(frozen=True)
class KeptSegmentation:
    """What the report needs of an evaluation of a segmenter."""

    subject: str
    weights: str
    data: str
    input: str
    images: int
    scores: RegionScores

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "KeptSegmentation":
        """Read the facts of `segmentation_result_facts`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if they are others.
        """
        words = (str(facts[name]) for name in ("subject", "weights", "data", "input"))
        return cls(*words, int(facts["images"]), RegionScores.of_json(facts))


def segmentation_result_facts(result: SegmentationResult) -> dict[str, Any]:
    """The result for JSON: what was evaluated, metrics in percent, IoU by class and the matrix of pixels."""
    how = result.how
    return {
        "subject": result.subject, "weights": result.weights, "data": result.data, "data_sha256": result.data_sha256,
        "input": result.input, "test": how.test, "scales": list(how.scales), "flip": how.flip,
        "precision": result.precision, "images": result.images, "metrics": result.scores.metrics,
        **result.scores.json_facts(),
    }  # fmt: skip


def keep_segmentations(results: Sequence[SegmentationResult]) -> Path | None:
    """Write the results into the stage of the first one, see `publish_results`; the method is the test."""
    how = results[0].how
    scales = "-".join(f"{scale:g}" for scale in how.scales)
    method = "-".join((METHOD, how.test, scales, *["flip"] * how.flip))
    return publish_results(results[0], method, [segmentation_result_facts(result) for result in results])


def kept_segmentations(stage: Path) -> list[list[KeptSegmentation]]:
    """Read the kept evaluations of a stage, see `read_kept`."""
    return read_kept(stage, METHOD, KeptSegmentation.of_facts)
