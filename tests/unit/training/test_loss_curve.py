"""The golden loss curve: what it must notice, and that today's program still follows it."""

import copy
import json

import numpy as np
import pytest

from tests.golden import FILE, TOLERANCE, differences, measure
from tests.ranks import in_processes


@pytest.fixture
def golden() -> dict:
    return json.loads(FILE.read_text())


def shifted(golden: dict, share: float, machine: str | None = None) -> dict:
    """The file, with the loss of one step changed by this share of it, or to the next float."""
    found = copy.deepcopy(golden)
    curve = found["losses"]["intermediate"]
    value = float.fromhex(curve[7])
    curve[7] = float(value * (1 + share) if share else np.nextafter(value, 9)).hex()
    if machine:
        found["machine"]["cpu"] = machine
    return found


def test_the_last_bit_counts_on_the_same_machine_and_the_tolerance_elsewhere(golden):
    assert differences(golden, golden) == []
    assert "intermediate: from step 8 on the loss differs" in differences(golden, shifted(golden, 0))[0]
    assert differences(golden, shifted(golden, 0, "another")) == []
    assert differences(golden, shifted(golden, 0.9 * TOLERANCE, "another")) == []
    assert "on another machine" in differences(golden, shifted(golden, 1.1 * TOLERANCE, "another"))[0]
    assert differences(golden, shifted(golden, np.nan, "another"))


def test_other_data_other_lengths_and_a_missing_stage_are_told(golden):
    other = copy.deepcopy(golden)
    other["data"]["train"] = "0" * 64
    assert "the images are others" in differences(golden, other)[0]
    short = copy.deepcopy(golden)
    del short["losses"]["pretrain"][-1]
    assert differences(golden, short) == ["pretrain: 19 steps instead of 20"]
    del short["losses"]["pretrain"]
    assert differences(golden, short) == ["pretrain: 0 steps instead of 20"]


def test_the_demo_still_starts_with_these_losses(golden, tmp_path):
    """After a change that is meant: `python -m tests.golden --write`."""
    assert differences(golden, in_processes([{}], measure, tmp_path)[0]) == []
