import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.weights import read_facts, read_weights, write_weights

FACTS = {"variant": "convnextv2", "step": 7, "depths": [1, 2], "of": {"b": 1, "a": None}}


def tensors():
    return {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.tensor(0.1), "n": torch.tensor([3, 4])}


def test_weights_come_back_as_fp32_with_their_facts(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    whole = torch.randn(4, 4, dtype=torch.float64)
    given = {**tensors(), "half": whole[:2], "also": whole[:2], "bf16": torch.ones(3, dtype=torch.bfloat16)}
    sha256 = write_weights(path, given, FACTS)
    found = read_weights(path, sha256)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    assert read_facts(path) == FACTS
    assert os.listdir(path.parent) == [path.name]


def test_the_bytes_depend_on_nothing_but_the_content(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_safetensors_file as t;"
        "items = list(t.tensors().items()); facts = dict(reversed(t.FACTS.items()));"
        "print(t.write_weights(sys.argv[2], dict(reversed(items)), facts))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not this process' own
    other = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path / "other")],
        env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert other.stdout.strip() == write_weights(tmp_path / "here", tensors(), FACTS)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "here").read_bytes()


def test_a_missing_file_names_path_and_remedy(tmp_path):
    for read in (read_weights, read_facts):
        with pytest.raises(CheckpointError, match=r"nowhere\.safetensors.*run the stage"):
            read(tmp_path / "nowhere.safetensors")


def test_another_files_hash_is_refused(tmp_path):
    sha256 = write_weights(tmp_path / "w", tensors(), FACTS)
    write_weights(tmp_path / "w", tensors(), {**FACTS, "step": 8})
    with pytest.raises(CheckpointError, match=f"instead of {sha256}"):
        read_weights(tmp_path / "w", sha256)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_cut_short_anywhere_is_refused(tmp_path, data):
    sha256 = write_weights(tmp_path / "w", tensors(), FACTS)
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for expected in (None, sha256):
        with pytest.raises(CheckpointError):
            read_weights(tmp_path / "w", expected)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_another_kind_of_file_has_no_facts(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_facts(tmp_path / "w")


def test_facts_are_one_canonical_key(tmp_path):
    write_weights(tmp_path / "w", tensors(), FACTS)
    data = (tmp_path / "w").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata == {"fcmae": '{"depths":[1,2],"of":{"a":null,"b":1},"step":7,"variant":"convnextv2"}'}
