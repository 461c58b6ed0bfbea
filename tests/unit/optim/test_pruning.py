"""The pure functions of sparsity: exact counts, whatever the numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.optim.pruning import (
    erk_densities,
    grow_mask,
    hash_places,
    mark_smallest,
    prune_mask,
    prune_rate,
    random_weight_mask,
    snip_densities,
    uniform_densities,
)
from pipeline.randomness import mix64

CPU = torch.device("cpu")
few_values = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=30)  # many ties
shapes = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.one_of(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 12)] * 4)),
    min_size=1,
    max_size=6,
)


@given(few_values, st.data())
def test_smallest_marks_as_many_as_asked_for_and_prefers_the_first(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda place: (values[place], place))[:count]
    assert mark_smallest(torch.tensor(values), count).nonzero().flatten().tolist() == sorted(expected)


@given(few_values, st.floats(0.005, 1.0), st.integers(0, 2**63 - 1), st.data())
def test_what_is_pruned_is_grown_to_the_last_weight(values, rate, key, data):
    weight = torch.tensor(values)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    removed = math.ceil(rate * int(mask.sum()))
    kept = prune_mask(weight, mask, removed)
    assert int(kept.sum()) == int(mask.sum()) - removed
    assert not (kept & ~mask).any()
    if kept.any() and removed:
        assert weight[kept].abs().min() >= weight[mask & ~kept].abs().max()
    for scores in (hash_places(key, len(values), CPU), -weight.abs()):
        new = grow_mask(kept, removed, scores)
        assert int(new.sum()) == int(mask.sum())
        assert not (kept & ~new).any()


def test_growth_takes_the_smallest_scores_outside_the_mask():
    mask = torch.tensor([[True, False, False], [False, True, False]])
    scores = torch.tensor([-9.0, -1.0, -5.0, -3.0, -9.0, 0.0])
    assert grow_mask(mask, 2, scores).tolist() == [[True, False, True], [True, True, False]]


@given(st.integers(0, 2**64 - 1), st.integers(1, 200))
def test_hashes_are_those_of_the_pipeline(key, count):
    expected = mix64(mix64(np.arange(count, dtype=np.uint64)) ^ np.uint64(key))
    assert hash_places(key, count, CPU).numpy().view(np.uint64).tolist() == expected.tolist()


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(0, 1), st.integers(0, 2**64 - 1))
def test_a_random_mask_has_exactly_its_density(shape, density, key):
    size = math.prod(shape)
    expected = size if density >= 0.99 else round(density * size)
    assert int(random_weight_mask(shape, density, key, CPU).sum()) == expected


def test_random_masks_are_everywhere_alike():
    masks = torch.stack([random_weight_mask((20,), 0.3, key, CPU) for key in range(4000)]).double()
    assert (masks.mean(0) - 0.3).abs().max() < 4 * (0.21 / 4000) ** 0.5
    assert abs(torch.corrcoef(masks[:, :2].T)[0, 1] + 1 / 19) < 0.06  # exact counts repel each other by 1 / (n - 1)


@given(
    st.integers(2, 60).flatmap(lambda n: st.lists(st.integers(0, 1000), min_size=n, max_size=n, unique=True)),
    st.floats(0.05, 0.95),
)
def test_snip_keeps_the_best_scores_of_all_layers_together(scores, sparsity):
    layers = {"a": scores[: len(scores) // 2], "b": scores[len(scores) // 2 :]}
    best = set(sorted(scores, reverse=True)[: max(int(len(scores) * (1 - sparsity)), 1) - 1])
    found = snip_densities({name: torch.tensor(values).double() for name, values in layers.items()}, sparsity)
    assert found == {name: len(best & set(values)) / len(values) for name, values in layers.items()}


@given(shapes, st.floats(0.05, 0.95))
def test_erk_and_uniform_have_the_sparsity_asked_for(shapes, sparsity):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for spread in (erk_densities, uniform_densities):
        densities = spread(shapes, sparsity)
        assert sum(sizes[n] * d for n, d in densities.items()) == pytest.approx((1 - sparsity) * sum(sizes.values()))
        assert all(0 <= density <= 1 + 1e-12 for density in densities.values())
    erk = erk_densities(shapes, sparsity)
    free = {sum(shapes[n]) / sizes[n] / erk[n] for n in shapes if erk[n] < 1}
    assert not free or max(free) == pytest.approx(min(free))


@given(st.integers(1, 10**6), st.floats(0.1, 1), st.floats(0, 0.1))
def test_the_prune_rate_falls_from_first_to_last(total, first, last):
    rates = [prune_rate(step, total, first, last) for step in (0, total // 3, total // 2, total)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == pytest.approx((first, last))
