"""Recipes: typed sections (`sections`, `model_settings`, `schema`), read from YAML (`yaml_files`).

A recipe is a YAML file. `extends: other.yaml`, or a list of files, names the files that it builds on. `defaults:` are
values that all stages share. A stage set to null is left out. `init:` names weights that the first stage starts with.
`published:` holds the results of others. Every key is checked.
"""

from pipeline.recipe.chain_recipe import ChainRecipe
from pipeline.recipe.detection_settings import DetectionSettings
from pipeline.recipe.fields import changed_fields
from pipeline.recipe.model_settings import ConvNeXtSettings, NextViTSettings, SLaKSettings
from pipeline.recipe.schema import StageRecipe
from pipeline.recipe.sections import ClassificationSettings, FCMAESettings
from pipeline.recipe.segmentation_settings import SegmentationSettings
from pipeline.recipe.yaml_files import load_recipe, load_stage_recipe, write_recipe

__all__ = [
    "ChainRecipe",
    "ClassificationSettings",
    "ConvNeXtSettings",
    "DetectionSettings",
    "FCMAESettings",
    "NextViTSettings",
    "SLaKSettings",
    "SegmentationSettings",
    "StageRecipe",
    "changed_fields",
    "load_recipe",
    "load_stage_recipe",
    "write_recipe",
]
