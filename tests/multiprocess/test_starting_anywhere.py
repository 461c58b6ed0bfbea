"""A chain that begins with weights of others, and a stage that evaluates nothing."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.tracking import journal
from pipeline.weights.safetensors_file import read_weights
from tests.support import fcmae, write_tiny_recipe
from tools.weights.convert import convert

LAYOUTS = {"official": "official.pth", "transformers": "transformers.bin"}  # timm builds four stages only
FIRST_TWO = ["stages.finetune=null"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe of pre-training and fine-tuning, and its run."""
    directory = tmp_path_factory.mktemp("anywhere")
    recipe = write_tiny_recipe(directory)
    done = fcmae("run", recipe, "--out", directory / "run", *FIRST_TWO)
    assert done.returncode == 0, done.stderr
    return recipe, directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_in_a_file_is_as_good_as_the_stage_before(chain, tmp_path, layout):
    """Bit for bit, though the file holds nothing but the encoder and the second run evaluates nothing."""
    recipe, run = chain
    file = tmp_path / LAYOUTS[layout]
    convert(run / "pretrain" / "weights.safetensors", file, layout, head="drop")
    changes = ["stages.pretrain=null", f"init={file}", "stages.intermediate.data.validation=null"]
    done = fcmae("run", recipe, "--out", tmp_path / "run", *FIRST_TWO, *changes)
    assert done.returncode == 0, done.stderr

    whole, half = run / "intermediate", tmp_path / "run" / "intermediate"
    expected = read_weights(whole / "weights.safetensors")
    found = read_weights(half / "weights.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    result = json.loads((half / "result.json").read_text())
    assert result["metrics"] == {}
    assert json.loads((whole / "result.json").read_text())["metrics"]["top1"] > 0
    events = journal.read_events(half / "journal.jsonl")
    assert not [e for e in events if e["kind"] == "evaluate"]
    assert not [e for e in events if e["kind"] == "save" and e["why"] == "best"]
    (handoff,) = [e for e in events if e["kind"] == "handoff"]
    assert handoff["source"] == str(file)
    assert handoff["sha256"] == json.loads((half / "init.json").read_text())["sha256"]

    # Once it has begun, the stage needs the file no more: DONE is taken away, so the end is made again.
    file.unlink()
    (half / "DONE").unlink()
    again = fcmae("run", recipe, "--out", tmp_path / "run", *FIRST_TWO, *changes)
    assert again.returncode == 0, again.stderr
    assert json.loads((half / "result.json").read_text())["weights_sha256"] == result["weights_sha256"]


def test_weights_that_are_not_there_are_told_before_anything_starts(tmp_path):
    recipe = write_tiny_recipe(tmp_path)
    done = fcmae("run", recipe, "--out", tmp_path / "run", "stages.pretrain=null", "init=/nowhere/x.pt", *FIRST_TWO)
    assert done.returncode == 1
    assert done.stderr == "fcmae: stage intermediate: init.weights /nowhere/x.pt does not exist; correct the path\n"
    assert not (tmp_path / "run" / "intermediate" / "journal.jsonl").exists()
