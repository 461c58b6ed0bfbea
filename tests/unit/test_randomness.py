import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.randomness import Purpose, key, mix64, mix64_tensor, text_key, uniform


def test_the_mix_is_splitmix64():
    # The first outputs of the published generator for seed 1234567.
    state, gamma, found = np.array([1234567], np.uint64), np.uint64(0x9E3779B97F4A7C15), []
    for _ in range(3):
        found.append(int(mix64(state)[0]))
        state = state + gamma
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_tensors_and_arrays_have_the_same_mix():
    numbers = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64)
    mixed = mix64_tensor(torch.from_numpy(numbers.view(np.int64)))
    np.testing.assert_array_equal(mixed.numpy().view(np.uint64), mix64(numbers))


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), ids=st.lists(st.integers(0, 2**40), min_size=1))
def test_keys_of_a_batch_are_the_keys_of_its_samples(seed, epoch, ids):
    together = key(seed, epoch, np.array(ids), Purpose.CROP)
    assert together.tolist() == [int(key(seed, epoch, i, Purpose.CROP)) for i in ids]


def test_every_part_matters():
    keys = {int(key(*parts)) for parts in [(1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2), (1, 2, 3, 0), (1, 2, 4)]}
    assert len(keys) == 6


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(key(7, 0, np.arange(2000), Purpose.MASK), 50)
    assert numbers.shape == (2000, 50)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.005)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.001)
    assert abs(np.corrcoef(numbers.T)[np.triu_indices(50, 1)]).max() < 0.1
    assert len(np.unique(numbers)) == numbers.size


def test_text_keys():
    assert text_key("a", "b") != text_key("ab")
    assert 0 <= text_key(0, "pretrain") < 2**63
