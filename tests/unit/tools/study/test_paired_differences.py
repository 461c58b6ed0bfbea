"""Paired differences between the arms of a study, and Student's t against printed tables."""

import math
import statistics

import pytest
import yaml

from pipeline.errors import RecipeError
from tools.study.definition import load_study
from tools.study.paired_differences import PairedDifference, student_t
from tools.study.study_table import ArmResult, pair_rows, paired_differences

TABLE = {  # Abramowitz and Stegun, table 26.10, by probability within and degrees of freedom
    (0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 4): 2.776, (0.95, 7): 2.365, (0.95, 9): 2.262,
    (0.95, 30): 2.042, (0.95, 120): 1.980, (0.99, 1): 63.657, (0.99, 4): 4.604, (0.90, 10): 1.812, (0.80, 5): 1.476,
}  # fmt: skip


@pytest.mark.parametrize(("level", "freedom"), TABLE)
def test_student_is_the_printed_table(level, freedom):
    assert student_t(level, freedom) == pytest.approx(TABLE[level, freedom], abs=6e-4)


def test_with_many_degrees_student_is_normal():
    assert student_t(0.95, 10**5) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


def test_a_difference_of_known_interval():
    """Sleep of ten patients under two drugs (Student 1908): the difference is 1.58 h, its interval 0.70 to 2.46 h."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = PairedDifference.of("second", "first", "top1", second, first)
    assert found.mean == pytest.approx(1.58)
    assert found.interval == pytest.approx((0.7001, 2.4599), abs=1e-4)
    assert found.excludes_zero
    assert pair_rows([found]) == [("second", "first", "+1.58", "+0.70 to +2.46 *", "10", "9 of 10")]
    assert PairedDifference.of("first", "second", "top1", first, second).interval == pytest.approx(
        tuple(-end for end in reversed(found.interval))
    )


def test_what_all_seeds_share_does_not_widen_the_interval():
    seeds = dict(enumerate([50.0, 60.0, 70.0]))
    shifted = {seed: value + shift for (seed, value), shift in zip(seeds.items(), (1.0, 1.0, 1.0), strict=True)}
    assert PairedDifference.of("a", "b", "top1", shifted, seeds).interval == pytest.approx((1, 1))


@pytest.fixture
def study(tmp_path):
    def load(pairs=(), overrides=(), seeds=(0, 1, 2)):
        content = {"name": "s", "about": "Does it?", "recipe": "demo", "seeds": list(seeds), "pairs": list(pairs)}
        content["arms"] = {name: {"remark": name} for name in ("base", "one", "two")}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_study(tmp_path / "study.yaml", overrides)

    return load


def arm(name, **results):
    finished = tuple(int(seed[1:]) for seed in results)
    return ArmResult(name, "top1", tuple(results.values()), finished, 3, 60.0, None, "")


ARMS = [arm("base", s0=50.0, s1=52.0, s2=51.0), arm("one", s0=51.0, s2=54.0), arm("two")]


def test_only_seeds_that_both_arms_finished_count(study):
    one, two = paired_differences(study(), ARMS)
    assert (one.arm, one.minus, one.seeds, one.values) == ("one", "base", (0, 2), (1.0, 3.0))
    half = 12.7062 * math.sqrt(2) / math.sqrt(2)
    assert one.interval == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert not one.excludes_zero
    assert (two.mean, two.interval) == (None, None)
    assert pair_rows([one, two]) == [
        ("one", "base", "+2.00", "-10.71 to +14.71", "2", "2 of 2"), ("two", "base", "", "", "0", ""),
    ]  # fmt: skip


def test_arms_with_different_metrics_have_no_difference(study):
    loss = ArmResult("one", "loss", (0.6, 0.5), (0, 1), 3, 60.0, None, "")
    assert [(p.arm, p.metric) for p in paired_differences(study(), [ARMS[0], loss, ARMS[2]])] == [("two", "top1")]
    unfinished = ArmResult("two", "", (), (), 3, None, None, "")
    assert [p.metric for p in paired_differences(study([("one", "two")]), [ARMS[0], loss, unfinished])] == ["loss"]


def test_a_study_names_its_pairs_and_an_arm_left_out_takes_its_pairs_along(study):
    pairs = [("one", "two"), ("base", "two")]
    assert [(p.arm, p.minus) for p in paired_differences(study(pairs), ARMS)] == pairs
    assert study(pairs, ["arms.one=null"]).pairs == (("base", "two"),)
    assert paired_differences(study(pairs, ["seeds=[0]"]), ARMS) == []
    with pytest.raises(RecipeError, match="pairs names the arm 'thre', but the arms are base, one, two"):
        study([("one", "thre")])
