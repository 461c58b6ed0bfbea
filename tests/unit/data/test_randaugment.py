"""RandAugment's draws: by hash, with timm's distributions and ranges."""

import numpy as np
import pytest

from pipeline.data.randaugment import NOTHING, NUMBERS, OPERATIONS, draw_operations, strengths
from pipeline.recipe.randaugment_settings import RandAugmentSettings
from tests.oracles import oracle

IDS = np.arange(60_000)
POLICY = RandAugmentSettings.parse("rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="module")
def timm():
    oracle("timm", always_in_ci=True)
    from timm.data import auto_augment

    return auto_augment


@pytest.fixture(scope="module")
def drawn():
    return draw_operations(POLICY, 3, 1, IDS, (224, 224))


def test_draws_depend_on_seed_epoch_and_sample_alone(drawn):
    codes, numbers = drawn
    some = IDS[::-7]
    for found, whole in zip(draw_operations(POLICY, 3, 1, some, (224, 224)), (codes, numbers), strict=True):
        np.testing.assert_array_equal(found, whole[::-7])
    for seed, epoch in ((3, 2), (4, 1), (1, 3)):
        assert (draw_operations(POLICY, seed, epoch, IDS, (224, 224))[0] == codes).all(
            1
        ).mean() < 0.4  # 0.25 are both nothing


def test_operations_are_drawn_evenly_with_replacement_half_the_time(drawn):
    codes, _ = drawn
    assert abs((codes == NOTHING).mean() - 0.5) < 0.01
    for layer in codes.T:
        counts = np.bincount(layer[layer != NOTHING], minlength=len(OPERATIONS))
        assert (abs(counts / counts.sum() - 1 / 15) < 0.006).all()
    both = codes[(codes != NOTHING).all(1)]
    assert abs((both[:, 0] == both[:, 1]).mean() - 1 / 15) < 0.01


def test_magnitudes_are_normal_and_clipped(drawn):
    codes, numbers = drawn
    degrees = abs(numbers[codes == OPERATIONS.index("Rotate")])
    turned = np.degrees(np.arcsin(degrees[:, 1]))
    assert abs(turned.mean() - 27) < 0.1  # N(9, 0.5) of 10, times 30 degrees
    assert abs(turned.std() - 1.5) < 0.1
    factors = numbers[codes == OPERATIONS.index("ShearX"), 1]
    assert abs((factors > 0).mean() - 0.5) < 0.03
    assert abs(factors).max() == pytest.approx(0.3)
    assert abs((abs(factors) == 0.3).mean() - 0.0228) < 0.01  # what lies beyond 10, two deviations away
    plain = draw_operations(RandAugmentSettings.parse("rand-m9-inc1"), 3, 1, IDS, (224, 224))
    assert np.unique(abs(plain[1][plain[0] == OPERATIONS.index("ShearX"), 1])).tolist() == [pytest.approx(0.27)]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_strengths_are_timms(timm, name, sign, monkeypatch):
    monkeypatch.setattr(timm.random, "random", lambda: 0.0 if sign > 0 else 1.0)
    to_arguments = timm.LEVEL_TO_ARG[name]
    if to_arguments is None or name == "Rotate":  # Rotate's map is compared through its pixels
        return
    magnitudes = np.array([0.0, 10.0, 2.5, 5.0, 7.5, *np.random.default_rng(0).uniform(0, 10, 200)])
    place = {"ShearX": 1, "ShearY": 3, "TranslateXRel": 2, "TranslateYRel": 5}.get(name, 0)
    size = 224 if name.startswith("Translate") else 1
    found = strengths(name, magnitudes / 10, np.full(len(magnitudes), sign), (224, 224))
    assert found.shape == (len(magnitudes), NUMBERS)
    np.testing.assert_array_equal(found[:, place], [to_arguments(m, {})[0] * size for m in magnitudes])
