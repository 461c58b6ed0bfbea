"""The published table, and what counts as agreement with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import VARIANTS
from tools.evaluate.published import TOLERANCE, judge, published, table
from tools.evaluate.report import compared
from tools.evaluate.run import Result


def test_the_table_is_whole():
    rows = table().results
    assert len({(r.model, r.chain, r.image_size, r.data) for r in rows}) == len(rows)
    assert {r.model for r in rows} == set(VARIANTS)
    assert all(r.paper or r.timm for r in rows)
    # The paper's figures are timm's to the printed digit, give or take the files' conversion from JAX.
    assert all(abs(r.paper.top1 - r.timm.top1) <= 0.1 for r in rows if r.paper and r.timm)
    (best,) = published("convnextv2_huge", 512)
    assert (best.paper.top1, best.timm.top1, best.timm.top5) == (88.9, 88.86, 98.74)


def test_the_band_is_two_standard_errors_and_the_tolerance():
    (row,) = published("convnextv2_huge", 512)
    verdict = judge(row, 88.6, 50_000)
    assert verdict.band == pytest.approx(1.96 * 100 * (0.8886 * 0.1114 / 50_000) ** 0.5 + TOLERANCE)
    assert verdict.within
    assert not judge(row, 88.4, 50_000).within
    assert "OUTSIDE" in str(judge(row, 88.4, 50_000))


@given(st.floats(0.1, 100), st.integers(1, 10**6))
def test_more_images_never_widen_the_band(top1, images):
    (row,) = published("convnextv2_huge", 512)
    verdict, more = judge(row, top1, images), judge(row, top1, 2 * images)
    assert more.band < verdict.band
    assert verdict.within == (abs(top1 - 88.86) <= verdict.band)


def result(variant: str | None, images: int, classes: int = 1000, size: int = 224) -> Result:
    metrics = {"top1": 83.0, "top5": 96.0, "images": images}
    return Result(metrics, "w", variant, "weights", size, 0.875, classes, (), "d", "")


def test_only_what_can_be_compared_is():
    both = compared(result("convnextv2_tiny", 50_000))
    assert [v.row.chain for v in both] == ["in1k", "in22k_in1k"]
    assert [v.within for v in both] == [True, False]
    assert [v.row.chain for v in compared(result("convnextv2_tiny", 50_000), chain="in1k")] == ["in1k"]
    for other in (result(None, 50_000), result("convnextv2_tiny", 10_000), result("convnextv2_tiny", 50_000, 200)):
        assert compared(other) == []
    assert len(compared(result("convnextv2_huge", 7500, 200, 512), "a")) == 1
