"""Check this node and print a table. Exit with 76 if the node is to blame, with 1 if no other node would do better.

`python -m cluster.preflight --run runs/demo --devices 8`
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from cluster.check_results import results_json, results_table
from cluster.preflight import Expectations, PreflightSettings, check_node, failure_outcome
from pipeline.stage.outcome import OutcomeKind


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.preflight", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="a stage or run directory, on the shared file system")
    parser.add_argument("--scratch", type=Path, help="local disk that data is staged to")
    parser.add_argument("--devices", type=int, default=0, help="GPUs that must be visible; 0 for training on CPUs")
    parser.add_argument("--settings", default="{}", help="as JSON, for instance '{\"matrix_floor_tflops\": 300}'")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args()
    try:
        settings = PreflightSettings.model_validate_json(given.settings)
    except ValueError as error:
        parser.error(f"--settings: {error}")
    results = check_node(
        Expectations(given.run, given.scratch, given.devices, int(os.environ.get("LOCAL_RANK", 0)), settings)
    )
    print(results_json(results)) if given.json else Console().print(results_table(results))
    outcome = failure_outcome(results)
    sys.stdout.flush()
    # A thread that waits for a hung mount would block an orderly exit.
    os._exit((outcome.kind if outcome else OutcomeKind.DONE).exit_code)


if __name__ == "__main__":
    main()
