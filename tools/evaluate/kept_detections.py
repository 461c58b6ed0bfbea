"""Keep evaluations of a detector in its stage directory, where `fcmae report` finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.evaluate.detection_evaluation import DetectionResult
from tools.evaluate.detection_scores import DetectionScores
from tools.evaluate.kept_results import publish_results, read_kept

METHOD = "detection"  # how the files' names begin


@dataclass(frozen=True)
class KeptDetection:
    """What the report needs of an evaluation of a detector."""

    subject: str
    weights: str
    data: str
    input: str
    images: int
    scores: DetectionScores

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "KeptDetection":
        """Read the facts of `detection_result_facts`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if they are others.
        """
        words = (str(facts[name]) for name in ("subject", "weights", "data", "input"))
        return cls(*words, int(facts["images"]), DetectionScores.of_json(facts))


def detection_result_facts(result: DetectionResult) -> dict[str, Any]:
    """The result for JSON: what was evaluated, the figures in percent, and those of each class."""
    return {
        "subject": result.subject, "weights": result.weights, "data": result.data, "data_sha256": result.data_sha256,
        "input": result.input, "test": result.test, "precision": result.precision, "images": result.images,
        **result.scores.json_facts(),
    }  # fmt: skip


def keep_detections(results: Sequence[DetectionResult]) -> Path | None:
    """Write the results into the stage of the first one, see `publish_results`; the method is the test."""
    facts = [detection_result_facts(result) for result in results]
    return publish_results(results[0], f"{METHOD}-{results[0].test}", facts)


def kept_detections(stage: Path) -> list[list[KeptDetection]]:
    """Read the kept evaluations of a stage, see `read_kept`."""
    return read_kept(stage, METHOD, KeptDetection.of_facts)
