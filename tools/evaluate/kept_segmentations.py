"""Keep evaluations of a segmenter in its stage directory, where `fcmae report` finds them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import first_line
from pipeline.storage.bounded_files import read_json
from pipeline.storage.file_names import EVALUATIONS_FOLDER
from pipeline.storage.run_records import name_unreadable
from tools.evaluate.kept_results import publish_results
from tools.evaluate.region_scores import RegionScores
from tools.evaluate.segmentation_evaluation import SegmentationResult

PREFIX = "segmentation-"  # of the files' names


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
    """Write the results into the stage of the first one, in place of earlier ones of the same test on the same data.

    The same test also has the same kind of weights (moving average or raw) and the same precision.

    Returns the file; None if the first result's weights have no stage.

    Raises:
        UserError: if the stage directory cannot be written.
    """
    first = results[0]
    if first.stage is None:
        return None
    folder, scales = Path(first.stage) / EVALUATIONS_FOLDER, "-".join(f"{scale:g}" for scale in first.how.scales)
    kind = "ema" if first.weights.startswith("ema") else "raw"  # also "ema of CHECKPOINT"
    parts = first.how.test, scales, *["flip"] * first.how.flip, kind, first.precision, first.data_sha256[:12]
    name = f"{PREFIX}{'-'.join(parts)}.json"
    return publish_results(folder, name, json.dumps([segmentation_result_facts(result) for result in results]))


def kept_segmentations(stage: Path) -> list[list[KeptSegmentation]]:
    """Read the kept evaluations of a stage, its own result first, then those beside it. Damaged files are left out."""
    found = []
    for path in sorted((stage / EVALUATIONS_FOLDER).glob(f"{PREFIX}*.json")):
        try:
            found.append([KeptSegmentation.of_facts(facts) for facts in read_json(path)])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError) as error:
            name_unreadable(path, first_line(error))
    return [results for results in found if results]
