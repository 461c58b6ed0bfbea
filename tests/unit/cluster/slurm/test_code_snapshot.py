"""The copy of the code that the jobs of a run execute."""

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.slurm import code_snapshot
from cluster.slurm.code_snapshot import code_snapshot_path, take_code_snapshot

REPOSITORY = Path(code_snapshot.__file__).parents[2]


def run_with(folder: Path, code: str) -> str:
    """What Python code prints whose PYTHONPATH is `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_the_snapshot_runs_alone_and_is_kept_once(tmp_path):
    folder = take_code_snapshot(tmp_path)
    assert take_code_snapshot(tmp_path) == folder == code_snapshot_path(tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    noted = json.loads((folder / "environment.json").read_text())
    assert noted["interpreter"] == sys.executable
    assert noted["packages"]["torch"]
    assert run_with(folder, "import cluster.slurm.supervisor as s; print(s.__file__)").startswith(str(folder))


def test_the_snapshot_brings_compiled_code_that_numba_takes(tmp_path):
    """Or every rank of every new run would compile for 20 s."""
    code = """
import numpy as np
from pipeline.data import image_checksum
image_checksum.checksum(np.arange(9, dtype=np.uint8))
print(image_checksum.__file__, sum(image_checksum.checksum.stats.cache_hits.values()))
"""

    def hits(folder: Path) -> int:
        printed = run_with(folder, code)
        assert printed.startswith(str(folder))
        return int(printed.split()[-1])

    hits(REPOSITORY)
    assert hits(take_code_snapshot(tmp_path)) == 1
