"""RandAugment's notation in recipes."""

import pytest

from pipeline.data.randaugment import OPERATIONS
from pipeline.recipe.randaugment_settings import RandAugmentSettings
from tests.oracles import oracle


def test_notation_means_what_it_means_in_timm():
    oracle("timm", always_in_ci=True)
    from timm.data import auto_augment

    for text in ("rand-m9-mstd0.5-inc1", "rand-inc1-m5", "rand-m10-p0.3-inc1-mstd1"):
        ours, theirs = RandAugmentSettings.parse(text), auto_augment.rand_augment_transform(text, {})
        assert [op.name for op in theirs.ops] == list(OPERATIONS)
        assert theirs.num_layers == 2
        first = theirs.ops[0]
        assert (ours.magnitude, ours.deviation, ours.probability) == (first.magnitude, first.magnitude_std, first.prob)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rand-m9-n3-inc1", "'n3' of 'rand-m9-n3-inc1' is not supported"),
        ("rand-m9-mmax10-inc1", "'mmax10'"),
        ("rand-m9-tweights-inc1", "'tweights'"),
        ("rand-m9-m8-inc1", "'m8'"),
        ("rand-m9-inc1-", "''"),
        ("rand-m9-mstd0.5", "only rand-m...-inc1 is"),
        ("rand-m9-inc0", "only rand-m...-inc1 is"),
        ("rand-mstd0.5-inc1", "only rand-m...-inc1 is"),
        ("original-m9-inc1", "only rand-m...-inc1 is"),
        ("rand-m11-inc1", "m is at most 10"),
        ("rand-m9-p1.5-inc1", "p at most 1"),
    ],
)
def test_what_is_not_supported_is_named(text, part):
    with pytest.raises(ValueError, match=r"not supported") as error:
        RandAugmentSettings.parse(text)
    assert part in str(error.value)
