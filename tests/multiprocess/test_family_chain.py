"""SLaK and Next-ViT through the same commands as the demo: killed in both stages and resumed, they end with the bits of
a run that nothing disturbed. Minutes each."""

import os
import signal
from pathlib import Path

import pytest
import yaml

from pipeline.recipe import load_recipe
from tests.multiprocess.test_chain import start
from tests.support import fcmae, tiny_data, wait_for_step, weights_sha256

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# The demo's recipe on tiny images, of tiny dims.
MICRO = {
    "demo-slak": ["defaults.model.dims=[6,8,10]", "stages.intermediate.sparsity.update_every_steps=4"],
    "demo-nextvit": ["defaults.model.dims=[12,24,36]", "defaults.model.head_dim=4", "defaults.model.stem_dim=8"],
}


def micro_recipe(name: str, directory: Path) -> Path:
    tiny_data(directory / "data")
    overrides = [
        *MICRO[name],
        *(f"stages.{stage}.objective.classes=4" for stage in ("intermediate", "finetune")),
        *(f"stages.{stage}.schedule={{epochs: 2, warmup_epochs: 0.5}}" for stage in ("intermediate", "finetune")),
        "stages.intermediate.objective.drop_path=0.2", "stages.finetune.data.image_size=24",
        "defaults.data.image_size=16", "defaults.batch={global_batch: 32, slot: 8, micro_slots: 1}",
        f"defaults.data.train={directory}/data/train.beton",
        f"defaults.data.validation={directory}/data/validation.beton",
        "defaults.checkpoint.every_steps=5", "defaults.evaluation.batch=16",
        "defaults.tracking={mlflow: false, log_every_steps: 1}",
    ]  # fmt: skip
    path = directory / "micro.yaml"
    path.write_text(
        yaml.safe_dump(load_recipe(RECIPES / f"{name}.yaml", overrides).model_dump(mode="json"), sort_keys=False)
    )
    return path


def digests(run: Path) -> list[str]:
    return [weights_sha256(run / stage) for stage in ("intermediate", "finetune")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MICRO)
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, name):
    recipe = micro_recipe(name, tmp_path)
    done = fcmae("run", recipe, "--out", tmp_path / "straight", "--nproc", 1, timeout_seconds=900)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "killed"
    for stage, step in (("intermediate", 7), ("finetune", 8)):
        process = start(recipe, run, 1, {stage: step + 2})
        wait_for_step(run / stage, step, timeout_seconds=900)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = fcmae("run", recipe, "--out", run, "--nproc", 1, timeout_seconds=900)
    assert done.returncode == 0, done.stderr
    assert digests(run) == digests(tmp_path / "straight")
    weights = run / "finetune" / "weights.safetensors"
    exported = fcmae("export", weights, tmp_path / "model.onnx", "--format", "onnx", timeout_seconds=900)
    assert exported.returncode == 0, exported.stderr
    assert "largest difference from PyTorch" in exported.stdout
