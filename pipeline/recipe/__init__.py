"""What to train: a typed schema of `sections`, read from YAML (`files`).

A recipe is YAML. `extends: other.yaml` starts from another file, or a list of them; `defaults:` is what the stages
share; a stage set to null is left out; `init:` names weights that the first stage begins with; `published:` tells what
others got. Every key is checked.
"""

from pipeline.recipe.files import dump, load, load_stage
from pipeline.recipe.models import ConvNeXtModel, NextViTModel, SLaKModel
from pipeline.recipe.schema import ChainRecipe, StageRecipe, changes
from pipeline.recipe.sections import ClassificationSettings, FCMAESettings

__all__ = [
    "ChainRecipe",
    "ClassificationSettings",
    "ConvNeXtModel",
    "FCMAESettings",
    "NextViTModel",
    "SLaKModel",
    "StageRecipe",
    "changes",
    "dump",
    "load",
    "load_stage",
]
