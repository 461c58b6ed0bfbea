"""Published recipes are the same experiments as before: fields that are added leave their fingerprints."""

import json
from pathlib import Path

from pipeline.recipe import load_recipe
from tools.recipes.library import find_recipe

FILE = Path(__file__).with_name("fingerprints.json")


def test_published_recipes_keep_their_fingerprints():
    """A recipe's line in the file changes only where its experiment is meant to change."""
    for name, expected in json.loads(FILE.read_text()).items():
        stages = load_recipe(find_recipe(name)).stages
        assert {stage: recipe.fingerprint()[:16] for stage, recipe in stages.items()} == expected, name
