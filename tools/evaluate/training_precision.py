"""Say where an evaluation has another precision than those during training, and so other figures."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe import StageRecipe
from pipeline.recipe.image_size import height_and_width
from pipeline.stage.directory import Stage, read_done
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import effective_events, is_number, read_events
from pipeline.tracking.metric_names import TITLES, judging_metric
from tools.evaluate.detection_evaluation import DetectionResult
from tools.evaluate.run_evaluation import EvaluationResult
from tools.evaluate.segmentation_evaluation import SegmentationResult
from tools.predict.segmentation_model import SegmentationTest

Result = EvaluationResult | SegmentationResult | DetectionResult


def precision_notes(result: Result) -> list[str]:
    """Name the figure of a finished stage's own last evaluation, if it was computed in bf16 and differs.

    Nothing is said of other images, other weights or another test than the stage evaluated.
    """
    if result.stage is None or result.precision != "fp32" or " of " in result.weights:  # "ema of CHECKPOINT"
        return []
    directory = Path(result.stage)
    try:
        recipe, done = Stage(directory).recipe, read_done(directory)
    except UserError:
        return []
    if done is None or not recipe.engine.precision.startswith("bf16") or not _as_trained(result, recipe):
        return []
    events = effective_events(read_events(directory / JOURNAL_FILE))
    data = next((e.get("validation") for e in reversed(events) if e.get("kind") == "data"), None)
    ours = next(
        (e.get("metrics") for e in reversed(events) if e.get("kind") == "evaluate" and e.get("step") == done.step), None
    )
    metrics, images = _metrics(result)
    name = judging_metric(metrics)
    if not isinstance(data, dict) or not isinstance(ours, dict) or name not in TITLES:
        return []
    before = ours.get(name)
    same_images = (data.get("sha256"), data.get("images")) == (result.data_sha256, images)
    if not same_images or not is_number(before) or f"{before:.3f}" == f"{metrics[name]:.3f}":
        return []
    return [
        f"at the end of training, {TITLES[name]} was {before:.3f} % on these images: the recipe computes in bf16, and"
        f" this evaluation in fp32 has {metrics[name]:.3f} %; --bf16 computes in bf16 too"
    ]


def _metrics(result: Result) -> tuple[dict[str, float], int]:
    if isinstance(result, EvaluationResult):
        return result.metrics, int(result.metrics["images"])
    return result.scores.metrics, result.images


def _as_trained(result: Result, recipe: StageRecipe) -> bool:
    """Whether images were tested as the stage tests them."""
    if isinstance(result, DetectionResult):
        return result.as_trained
    if isinstance(result, SegmentationResult):
        scenes = recipe.data.scenes
        return scenes is not None and result.how == SegmentationTest(scenes.test, (1.0,), False)
    size = tuple(height_and_width(result.image_size)), result.crop_pct
    head = result.neighbours_of is None and result.outputs is None and not result.missing
    return head and size == (tuple(height_and_width(recipe.data.image_size)), recipe.data.crop_pct)
