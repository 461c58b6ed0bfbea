"""Subsets of a data file: a share of each class, the same for ever, and what the model sees of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.beton import open_beton, samples_of
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.feed import EvaluationFeed
from pipeline.data.subset import count_per_class, select_subset
from pipeline.distributed.world import World
from pipeline.errors import RecipeError
from pipeline.recipe.sections import DataSettings

CLASSES = ("ape", "bee", "cat", "dog")
LABELS = [0] * 3 + [1] * 40 + [3] * 7 + [2] * 100


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("subset") / "a.beton"
    with BetonWriter(path, CLASSES, len(LABELS)) as writer:
        for i in np.random.default_rng(0).permutation(len(LABELS)):
            writer.add(np.full((8, 8, 3), LABELS[i], np.uint8), LABELS[i])
    return open_beton(path)


@pytest.fixture(scope="module")
def labels(beton):
    return samples_of(beton)["f1"]


def test_all_of_it_costs_nothing(beton):
    everything = select_subset(beton)
    assert (everything.samples, everything.ids, everything.labels) == (150, None, None)
    assert everything.classes == CLASSES


@settings(deadline=None)
@given(st.floats(1e-6, 1), st.sets(st.sampled_from(CLASSES), min_size=1), st.integers(0, 2**40))
def test_each_class_has_its_share(beton, labels, fraction, classes, seed):
    part = select_subset(beton, sorted(classes, reverse=True), fraction, seed)
    counts = count_per_class(beton, classes, fraction)
    assert list(counts) == sorted(classes)
    for name, count in counts.items():
        there = LABELS.count(CLASSES.index(name))
        assert count == min(max(int(fraction * there + 0.5), 1), there)
    assert part.samples == len(part.ids) == sum(counts.values())
    assert np.all(np.diff(part.ids) > 0)
    assert np.bincount(part.labels[labels[part.ids]], minlength=len(classes)).tolist() == list(counts.values())


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2**40))
def test_a_smaller_fraction_is_part_of_a_larger_one(beton, a, b, seed):
    small, large = sorted((a, b))
    ids = select_subset(beton, CLASSES, large, seed).ids
    assert set(select_subset(beton, CLASSES, small, seed).ids) <= set(ids)


def test_the_choice_is_the_seeds_and_stays(beton):
    first, again, other = (select_subset(beton, None, 0.1, seed).ids.tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first == [24, 33, 41, 58, 62, 66, 73, 87, 101, 111, 119, 126, 128, 129, 144, 148]  # must never change


def test_an_unknown_class(beton):
    with pytest.raises(
        RecipeError, match=r"data\.classes: a\.beton has no class 'cow'; it has 4, such as ape, bee, cat"
    ):
        select_subset(beton, ["cat", "cow"])


def test_what_the_model_sees(beton):
    part = select_subset(beton, ["dog", "ape"])
    assert part.classes == ("ape", "dog")
    settings = DataSettings(train=str(beton.path), image_size=8, crop_pct=1.0)
    feeds = [
        EvaluationFeed(part, settings, 4, replace(World.alone(), rank=rank, size=2), workers=1) for rank in range(2)
    ]
    seen = [
        (int(i), int(y), int(x[0, 0, 0]))
        for f in feeds
        for b in f
        for i, y, x, v in zip(b.ids, b.labels, b.images, b.valid, strict=True)
        if v
    ]
    assert sorted(i for i, _, _ in seen) == part.ids.tolist()
    assert {(y, pixel) for _, y, pixel in seen} == {(0, 0), (1, 3)}  # ape stays 0, dog becomes 1
