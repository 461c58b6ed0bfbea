"""The best time between two saves: formulas, simulation, and what a user may assume."""

import math

import pytest

from cluster.site import Site
from pipeline.errors import UserError
from tools.simulate.conditions import Conditions, read_conditions
from tools.simulate.intervals import best_interval, daly_seconds
from tools.simulate.stage_work import StageWork

WORK = StageWork("pretrain", 10**6, 1.0, 60, nodes=64, blocked_seconds=6.0, save_seconds=10.0)


def young_seconds(cost: float, between: float) -> float:
    return math.sqrt(2 * cost * between)


def test_daly_is_young_for_rare_failures_and_less_for_frequent_ones():
    assert daly_seconds(6.0, 1e9) == pytest.approx(young_seconds(6.0, 1e9), rel=1e-3)
    assert daly_seconds(100.0, 1_000.0) < young_seconds(100.0, 1_000.0)
    assert daly_seconds(100.0, 40.0) == 40.0  # a save takes longer than two failures are apart


@pytest.mark.parametrize("rate", [0.005, 0.05])
def test_the_best_simulated_interval_is_near_the_formula(rate):
    best = best_interval(WORK, Conditions(failures_per_node_day=rate), range(8))
    assert best.daly / 2 < best.simulated < best.daly * 2
    assert best.share_simulated > best.share_now + 0.05


def test_without_losses_there_is_no_best_interval():
    assert best_interval(WORK, Conditions(failures_per_node_day=0.0), range(2)) is None
    saved = Conditions(failures_per_node_day=0.0, preemptions_per_hour=1.0)
    assert best_interval(WORK, saved, range(2)) is None
    killed = Conditions(failures_per_node_day=0.0, preemptions_per_hour=1.0, grace_seconds=5.0)
    assert best_interval(WORK, killed, range(2)).young == pytest.approx(young_seconds(6.0, 3600.0))


def test_assumptions_are_read_by_name():
    read = read_conditions(["failures_per_node_day=0.02", "start_seconds=60,90", "spare_nodes=0"], Site())
    assert read == Conditions(failures_per_node_day=0.02, start_seconds=(60.0, 90.0), spare_nodes=0)
    assert read_conditions([], Site(failures_per_node_day=0.5)).failures_per_node_day == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("failure=1", "there is no 'failure'; choose one of failures_per_node_day"),
        ("preemptions_per_hour", "give a number from 0"),
        ("preemptions_per_hour=often", "give a number from 0"),
        ("preemptions_per_hour=-1", "give a number from 0"),
        ("preemptions_per_hour=nan", "give a number from 0"),
        ("grace_seconds=1,2", "give a number from 0"),
        ("bad_share=2", "from 0 to 1"),
        ("written_bytes_per_second=0", "from 1 to"),
        ("lost_share=0.95", "their sum is at most 1"),
    ],
)
def test_an_impossible_assumption_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        read_conditions([text], Site())
