"""Keep evaluations of a stage's weights in the stage directory, where `fcmae report` finds them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.errors import UserError, first_line
from pipeline.recipe.image_size import describe_size, height_and_width
from pipeline.storage.bounded_files import read_json
from pipeline.storage.file_names import EVALUATIONS_FOLDER
from pipeline.storage.folder import Folder
from pipeline.storage.run_records import name_unreadable
from tools.evaluate.confusions import Confusions
from tools.evaluate.published import Z, result_facts
from tools.evaluate.run_evaluation import EvaluationResult

HEAD, NEIGHBOURS = "head", "neighbours"  # what answered: how the files' names begin
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class KeptResult:
    """What the report needs of an evaluation. `top1` and `top5` are in percent."""

    subject: str
    weights: str
    data: str
    neighbours_of: str | None
    """The training images whose nearest neighbours voted; None if the head answered."""
    input: str
    """What went through the network, in words."""
    conditions: tuple[str, ...]
    """What else the figures depend on: a sentence for each thing."""
    images: int
    top1: float
    top5: float
    confusions: Confusions | None

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> "KeptResult":
        """Read the facts of `result_facts`.

        Raises:
            KeyError, TypeError, ValueError: if they are others.
        """
        metrics = facts["metrics"]
        size = describe_size(facts["image_size"])
        return cls(
            str(facts["subject"]), str(facts["weights"]), str(facts["data"]), facts["neighbours_of"],
            str(facts.get("input", f"{size} px")),  # absent in files of earlier versions, as conditions are
            tuple(map(str, facts.get("conditions", ()))),
            int(metrics["images"]), float(metrics["top1"]), float(metrics["top5"]),
            Confusions.of_json(facts) if "confused" in facts else None,
        )  # fmt: skip


class Measured(Protocol):
    """An evaluation of any kind, for the name of its file."""

    stage: str | None
    weights: str
    precision: str
    data_sha256: str


def keep_results(results: Sequence[EvaluationResult]) -> Path | None:
    """Write results of a classifier, see `publish_results`; the method is what answered, its size, and whose labels."""
    first = results[0]
    size = "x".join(map(str, height_and_width(first.image_size)))
    method = f"{NEIGHBOURS if first.neighbours_of else HEAD}-{size}{'-real' if first.real else ''}"
    return publish_results(first, method, [result_facts(result) for result in results])


def publish_results(first: Measured, method: str, facts: Sequence[dict[str, Any]]) -> Path | None:
    """Write results into the stage of the first one, in place of earlier ones by the same method on the same data.

    Results of the moving average and of the raw weights stand beside each other, and so do those of each precision.

    Returns the file; None if the first result's weights have no stage.

    Raises:
        UserError: if the stage directory cannot be written.
    """
    if first.stage is None:
        return None
    folder = Path(first.stage) / EVALUATIONS_FOLDER
    kind = "ema" if first.weights.startswith("ema") else "raw"  # also "ema of CHECKPOINT"
    name = f"{method}-{kind}-{first.precision}-{first.data_sha256[:12]}.json"
    try:
        folder.mkdir(exist_ok=True)
        Folder.at(folder).publish(name, json.dumps(facts).encode())
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written ({error.strerror}); make it writable") from None
    return folder / name


def kept_results(stage: Path) -> list[list[KeptResult]]:
    """Read the kept evaluations of a classifier's stage, see `read_kept`."""
    return [*read_kept(stage, HEAD, KeptResult.of_facts), *read_kept(stage, NEIGHBOURS, KeptResult.of_facts)]


def read_kept(stage: Path, method: str, read: Callable[[dict[str, Any]], Kept]) -> list[list[Kept]]:
    """Read the kept evaluations whose method begins so: its own result first, then those beside it.

    Damaged files are left out.
    """
    found = []
    for path in sorted((stage / EVALUATIONS_FOLDER).glob(f"{method}-*.json")):
        try:
            found.append([read(facts) for facts in read_json(path)])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, IndexError) as error:
            name_unreadable(path, first_line(error))
    return [results for results in found if results]


def difference_of(own: KeptResult, other: KeptResult) -> str:
    """Say in a sentence how much more the own weights know, and what chance alone would make of it."""
    shares = [result.top1 / 100 for result in (own, other)]
    variance = sum(p * (1 - p) / result.images for p, result in zip(shares, (own, other), strict=True))
    band = 100 * Z * math.sqrt(variance)
    gain = own.top1 - other.top1
    word = "more" if gain >= 0 else "less"
    sure = "chance alone makes at most" if abs(gain) > band else "which chance alone can make: at most"
    return (
        f"{own.subject} has {own.top1:.2f} % and {other.subject} {other.top1:.2f} %: {abs(gain):.2f} percentage points"
        f" {word}; {sure} {band:.2f} in nineteen of twenty cases"
    )
