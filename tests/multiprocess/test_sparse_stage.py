"""A sparse SLaK stage through the command: killed, resumed, handed on with its zeros and its masks."""

import os
import signal

import pytest
import torch

from pipeline.tracking import journal
from pipeline.weights.safetensors_file import read_facts, read_weights
from tests.multiprocess.test_chain import start
from tests.support import fcmae, wait_for_step, weights_sha256, write_tiny_recipe

SPARSE_SLAK = [
    "stages.pretrain=null",
    "stages.intermediate=null",
    "stages.finetune.objective.drop_path=0.1",
    "defaults.tracking.log_every_steps=1",
    "defaults.engine.large_kernels=fft",
    "defaults.model={name: slak, depths: [1, 2], dims: [6, 8], kernel_sizes: [9, 7], small_kernel: 3, width: 1.0,"
    " layer_scale: 1.0, stem_stride: 2}",
    "stages.finetune.sparsity={sparsity: 0.4, update_every_steps: 3, export_masks: true}",
]


@pytest.mark.slow
def test_a_sparse_stage_is_killed_resumed_and_handed_on(tmp_path):
    recipe, hashes = write_tiny_recipe(tmp_path, SPARSE_SLAK), {}
    process = start(recipe, tmp_path / "killed", 2, {"finetune": 12})
    wait_for_step(tmp_path / "killed" / "finetune", 7)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for name in ("straight", "killed"):
        done = fcmae("run", recipe, "--out", tmp_path / name, "--nproc", 2)
        assert done.returncode == 0, done.stderr
        hashes[name] = weights_sha256(tmp_path / name / "finetune")
    assert hashes["killed"] == hashes["straight"]
    stage = tmp_path / "killed" / "finetune"
    weights, masks = read_weights(stage / "weights.safetensors"), read_weights(stage / "masks.safetensors")
    assert {mask.dtype for mask in masks.values()} == {torch.bool}
    assert all(not weights[name][~mask].any() for name, mask in masks.items())
    assert read_facts(stage / "masks.safetensors")["weights"] == "masks"
    (first,) = [
        event["densities"] for event in journal.read_events(stage / "journal.jsonl") if event["kind"] == "sparsity"
    ]
    assert first == {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    assert 0.5 < sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) < 0.7
