"""The order of samples: permutations by hash, shared by the ranks, each sample once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import evaluation_order, ids_of, rank_slots, train_order
from pipeline.errors import RecipeError
from pipeline.randomness import Purpose, key


def ids(seed, epoch, samples, global_batch):
    return ids_of(train_order(seed, epoch, samples, global_batch), seed, epoch)


@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(1, 300), st.data())
def test_train_order_is_a_cut_permutation(seed, epoch, samples, data):
    batch = data.draw(st.integers(1, samples))
    order = ids(seed, epoch, samples, batch)
    assert order.dtype == np.int64
    assert order.shape == (samples // batch, batch)
    assert len(set(order.flat)) == order.size
    assert order.min() >= 0
    assert order.max() < samples
    whole = np.argsort(key(seed, epoch, np.arange(samples), Purpose.ORDER), kind="stable")
    np.testing.assert_array_equal(order.reshape(-1), whole[: order.size])


def test_hashing_in_parts_changes_nothing():
    """More samples than are hashed at a time."""
    samples = 2 * (1 << 18) + 5
    expected = np.sort(key(5, 2, np.arange(samples), Purpose.ORDER))
    np.testing.assert_array_equal(train_order(5, 2, samples, samples)[0], expected)


def test_ids_that_take_part():
    own = np.array([3, 4, 8, 2**33, 11])
    assert sorted(ids(1, 2, own, 5)[0]) == sorted(own)
    assert len(set(ids(1, 2, own, 3)[0]) & set(own.tolist())) == 3


def test_seed_and_epoch_are_not_added_up():
    orders = [ids(seed, epoch, 1000, 10) for seed, epoch in [(6, 0), (5, 1), (5, 0), (6, 1)]]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a != b).mean() > 0.9


def test_every_sample_has_its_turn_in_the_dropped_rest():
    seen = np.concatenate([ids(1, epoch, 11, 10)[0] for epoch in range(40)])
    assert set(seen) == set(range(11))


@given(st.integers(1, 4), st.integers(1, 8), st.sampled_from([1, 2, 4, 8]))
def test_ranks_share_the_slots(steps, slot_size, world_size):
    slots = 8
    order = np.arange(steps * slots * slot_size).reshape(steps, -1)
    parts = [rank_slots(order, slots, rank, world_size) for rank in range(world_size)]
    assert all(part.shape == (steps, slots // world_size, slot_size) for part in parts)
    np.testing.assert_array_equal(np.stack(parts, 2).reshape(steps, -1), order)


@pytest.mark.parametrize(("world_size", "advice"), [(3, "2 or 4"), (16, "start 8 processes"), (5, "4 or 8")])
def test_unfitting_world_size_names_its_neighbours(world_size, advice):
    with pytest.raises(RecipeError, match=rf"world size {world_size} .*slots=8.*{advice}"):
        rank_slots(np.zeros((1, 16)), 8, 0, world_size)


def test_unfitting_slots_and_batches():
    with pytest.raises(RecipeError, match="slots=3 does not divide the global batch of 16"):
        rank_slots(np.zeros((1, 16)), 3, 0, 1)
    with pytest.raises(RecipeError, match="global batch of 11 images cannot be drawn from 10"):
        train_order(0, 0, 10, 11)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9))
def test_evaluation_sees_each_sample_once(samples, batch, world_size):
    ids, valid = evaluation_order(samples, batch, world_size)
    assert ids.shape == valid.shape
    assert ids.shape[1:] == (world_size, batch)
    assert sorted(ids[valid]) == list(range(samples))
    assert ids.min() >= 0
    assert ids.max() < samples
    assert ids.size - samples < world_size * batch
