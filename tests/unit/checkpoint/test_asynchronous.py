"""Save in a thread while the state changes."""

import torch

from pipeline.checkpoint.store import flatten


def same(left, right):
    left, right = flatten(left), flatten(right)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def overwrite(state):
    for tensor in flatten(state).values():
        tensor.fill_(7)


def test_a_state_that_changes_meanwhile_is_saved_as_it_was(held, state_of, open_store):
    store, go, _ = held
    state = state_of(5)
    save = store.save_in_background(state, step=5, why="due")
    overwrite(state)
    assert save.running
    go.set()
    save.wait()
    assert save.error is None
    target = state_of(0)
    assert open_store(2).restore(target) == 5
    assert same(target, state_of(5))


def test_buffers_are_kept_between_saves(open_store, state_of):
    store = open_store()
    store.save_in_background(state_of(1), step=1, why="due").wait()
    before = {index: buffer.data_ptr() for index, buffer in store._buffers.items()}
    assert len(before) == len(flatten(state_of(1)))
    store.save_in_background(state_of(2), step=2, why="due").wait()
    assert {index: buffer.data_ptr() for index, buffer in store._buffers.items()} == before
    target = state_of(0)
    assert store.restore(target) == 2
    assert same(target, state_of(2))
