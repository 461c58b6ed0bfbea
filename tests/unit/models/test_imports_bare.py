"""Models, layouts and kernels import and run with torch, numpy and the packages that these two need."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

BARE = """
import importlib.abc, importlib.metadata, re, sys

def needs(distribution, found):
    if distribution not in found:
        try:
            requirements = importlib.metadata.requires(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            return found
        found.add(distribution)
        for requirement in requirements:
            if "extra ==" not in requirement:
                needs(re.match(r"[\\w.-]+", requirement)[0].lower().replace("_", "-"), found)
    return found

needed = needs("numpy", needs("torch", set()))
allowed = {
    module for module, owners in importlib.metadata.packages_distributions().items()
    if needed & {owner.lower().replace("_", "-") for owner in owners}
} | set(sys.stdlib_module_names) | {"pipeline", "torch", "numpy"}

class Bare(importlib.abc.MetaPathFinder):
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        # The build's own _sysconfigdata_* is part of Python and in no list.
        if name.split(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [Bare()]
try:
    import pydantic
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the finder hides nothing")
"""

USE = """
import torch
import pipeline.kernels.large_kernel_timing, pipeline.models, pipeline.sparse
from pipeline.models.fcmae import FCMAE

encoder = pipeline.models.create_model("convnextv2", 0, depths=(1, 1), dims=(4, 8), stem_stride=2)
mask = torch.rand(2, 9).argsort(1) >= 3
for backend in ("packed", "masked"):
    FCMAE(encoder, backend, decoder_dim=8)(torch.randn(2, 3, 12, 12), mask).loss.backward()
loaded = {name.split(".")[0] for name in sys.modules}
print("works", *loaded & {"yaml", "pydantic", "ffcv", "mlflow", "triton", "spconv"} - allowed)
"""


def test_models_and_layouts_work_with_torch_and_numpy_alone():
    result = subprocess.run(
        [sys.executable, "-c", BARE + USE], cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["works"]
