"""What to train: a typed schema of `sections`, read from YAML (`files`).

A recipe is YAML. `extends: other.yaml` starts from another file, or a list of them; `defaults:` is what the stages
share; a stage set to null is left out; `init:` names weights that the first stage begins with; `published:` tells what
others got. Every key is checked.
"""

from pipeline.recipe.model_settings import ConvNeXtSettings, NextViTSettings, SLaKSettings
from pipeline.recipe.schema import ChainRecipe, StageRecipe, changed_fields
from pipeline.recipe.sections import ClassificationSettings, FCMAESettings
from pipeline.recipe.yaml_files import load_recipe, load_stage_recipe, write_recipe

__all__ = [
    "ChainRecipe",
    "ClassificationSettings",
    "ConvNeXtSettings",
    "FCMAESettings",
    "NextViTSettings",
    "SLaKSettings",
    "StageRecipe",
    "changed_fields",
    "load_recipe",
    "load_stage_recipe",
    "write_recipe",
]
