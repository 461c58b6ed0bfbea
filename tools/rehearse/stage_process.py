"""Rehearse one stage in a process of its own: a request as JSON on stdin, the result as JSON on stdout.

A process group is made and torch is loaded here, not in the command that asks.
"""

import json
import sys
import warnings

from pipeline.recipe import StageRecipe
from pipeline.rehearsal.stage_rehearsal import rehearse_stage


def main() -> None:
    request = json.load(sys.stdin)
    recipe = StageRecipe.model_validate_json(request.pop("recipe"))
    output, sys.stdout = sys.stdout, sys.stderr  # so that nothing that torch prints is taken for the result
    warnings.simplefilter("ignore")
    json.dump(rehearse_stage(recipe, **request).facts(), output)


if __name__ == "__main__":
    main()
