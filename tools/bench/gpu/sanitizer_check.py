"""compute-sanitizer's memcheck on the check of the kernels, where that tool is."""

import glob
import shutil
import subprocess
import sys
from collections.abc import Iterator

from tools.bench.gpu.check_table import Bench, CheckSkippedError, Row

PLACES = "/usr/local/cuda*/bin/compute-sanitizer"
ERROR_CODE = 86  # asked for, so that it cannot be the program's own


def check_sanitizer(bench: Bench) -> Iterator[Row]:
    """The number of the tool's error lines."""
    program = shutil.which("compute-sanitizer") or next(iter(sorted(glob.glob(PLACES))), None)
    if not program:
        raise CheckSkippedError("compute-sanitizer is not found")
    command = [program, "--tool", "memcheck", "--error-exitcode", str(ERROR_CODE), "--print-limit", "3"]
    check = ["--check", "kernels", "--device", bench.device.type, "--tiny", "--out", str(bench.folder)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tools.bench.gpu", *check], capture_output=True, text=True, check=False
    )
    errors = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
    if done.returncode not in (0, ERROR_CODE):
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise RuntimeError(f"the check of the kernels ended with {done.returncode} under compute-sanitizer: {said}")
    wrong = done.returncode == ERROR_CODE
    yield Row(
        "errors of memory in the kernels", float(wrong), "", limit=0, note="; ".join(errors[1:4]) if wrong else ""
    )
