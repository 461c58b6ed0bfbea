"""Objectives: how a stage learns. The recipe's `objective.kind` names one."""

from pipeline.objectives.classification import ClassificationObjective
from pipeline.objectives.detection import DetectionObjective
from pipeline.objectives.masked_autoencoding import FCMAEObjective
from pipeline.objectives.objective import Objective
from pipeline.objectives.segmentation import SegmentationObjective
from pipeline.recipe import StageRecipe

_KINDS = {
    "fcmae": FCMAEObjective,
    "classification": ClassificationObjective,
    "segmentation": SegmentationObjective,
    "detection": DetectionObjective,
}


def create_objective(recipe: StageRecipe, seed: int) -> Objective:
    """Create the objective of a stage; `seed` is the seed of the stage."""
    return _KINDS[recipe.objective.kind](recipe, seed)


__all__ = ["Objective", "create_objective"]
