import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.weights.heads import map_head, read_class_names

OLD = ["n01", "n02", "n03", "n04"]


def weights(rows=4):
    return {
        "norm.weight": torch.ones(2),
        "head.weight": torch.arange(1.0, 2 * rows + 1).view(rows, 2),
        "head.bias": torch.arange(1.0, rows + 1),
    }


def test_rows_move_by_name():
    given = weights()
    found, match = map_head(given, OLD, ["n03", "new", "n01"])
    assert found["head.weight"].tolist() == [[5, 6], [0, 0], [1, 2]]
    assert found["head.bias"].tolist() == [3, 0, 1]
    assert found["norm.weight"] is given["norm.weight"]
    assert (match.matched, match.unmatched, match.unused) == (("n03", "n01"), ("new",), ("n02", "n04"))
    assert "2 of 3 classes found by name; rows of zeros for new; 2 classes of the old head left out" in str(match)
    assert torch.equal(given["head.bias"], weights()["head.bias"])


@given(st.permutations(range(8)), st.integers(1, 8))
def test_logits_of_known_classes_stay(order, count):
    old = [f"n{row}" for row in range(8)]
    new = [old[row] for row in order[:count]]
    found, match = map_head(weights(8), old, new)
    features = torch.tensor([0.5, -2.0])
    before = weights(8)["head.weight"] @ features + weights(8)["head.bias"]
    assert torch.equal(found["head.weight"] @ features + found["head.bias"], before[list(order[:count])])
    assert (len(match.matched), len(match.unused)) == (count, 8 - count)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (OLD[:3], OLD, "head.weight has 4 rows but 3 class names were given"),
        (["a", "a", "b", "c"], ["a"], "class 'a' is listed 2 times"),
        (OLD, ["n01", "n02", "n01"], "class 'n01' is listed 2 times"),
        (OLD, ["cat"], "no class name is in both lists ('n01', ... and 'cat', ...)"),
        (OLD, [], "a list of class names is empty"),
    ],
)
def test_lists_that_cannot_be_right(old, new, sentence):
    with pytest.raises(CheckpointError) as caught:
        map_head(weights(), old, new)
    assert sentence in str(caught.value)


def test_from_imagenet_22k_to_1k():
    """Fall 2011 has all classes of ImageNet-1K but one; the lists are read from timm's files without importing timm."""
    if (timm := find_spec("timm")) is None:
        assert not os.environ.get("CI")
        pytest.skip("timm is not installed")
    lists = Path(timm.origin).parent / "data" / "_info"
    old, new = (read_class_names(lists / f"{name}_synsets.txt") for name in ("imagenet22k", "imagenet"))
    assert (len(old), len(new)) == (21841, 1000)
    found, match = map_head(weights(len(old)), old, new)
    assert (len(match.matched), match.unmatched) == (999, ("n04399382",))
    assert len(match.unused) == 21841 - 999
    kept = [row for row, name in enumerate(new) if name != "n04399382"]
    assert torch.equal(found["head.bias"][kept], torch.tensor([old.index(new[row]) + 1.0 for row in kept]))
    assert found["head.bias"][new.index("n04399382")] == 0


def test_without_a_head():
    with pytest.raises(CheckpointError, match=r"head\.weight is absent, so there is no head to map"):
        map_head({"norm.weight": torch.ones(2)}, OLD, OLD)


def test_class_names_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("n01\n n02 with spaces \n\nn03\n")
    assert read_class_names(tmp_path / "names.txt") == ["n01", "n02 with spaces", "n03"]
    (tmp_path / "names.json").write_text(json.dumps(OLD))
    assert read_class_names(tmp_path / "names.json") == OLD
    (tmp_path / "x.beton.json").write_text(json.dumps({"samples": 3, "classes": OLD}))
    assert read_class_names(tmp_path / "x.beton.json") == OLD


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2]", b"{}", b"3", b"{", b'"n01"'])
def test_files_without_class_names(tmp_path, content):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no class names"):
        read_class_names(path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_class_names(tmp_path / "nowhere")
