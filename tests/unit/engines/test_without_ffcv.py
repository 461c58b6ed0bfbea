"""Models, engines and the benchmarks that need no images run on noise where FFCV is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

CODE = """
import sys

class NoFFCV:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ffcv", "cv2"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoFFCV())
from pipeline.cost.measure import measure_steps
from tests.engines import stage_recipe

for stage in ("pretrain", "finetune"):
    assert measure_steps(stage_recipe(stage, "ddp"), steps=1).images_per_second > 0
import tools.bench.checkpoint_saving, tools.bench.encoder_layouts, tools.bench.gpu, tools.bench.huge_stages
import tools.bench.large_kernel_forms, tools.bench.save_planning, tools.bench.stop_agreement, tools.bench.timing
from tools.bench.gpu.training_step import make_step
try:
    import pipeline.data.ffcv_loader
except ModuleNotFoundError:
    print("works")
"""


@pytest.mark.slow
def test_engines_and_benchmarks_run_without_ffcv():
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["works"]
