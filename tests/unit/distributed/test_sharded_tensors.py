"""A run of a flattened tensor, as boxes and through a checkpoint."""

from math import prod

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.sharded_tensors import FlatShard, boxes, fill, local, whole

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_are_the_run_in_order(shape, data):
    numel = prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, numel), st.integers(0, numel))))
    numbers = torch.arange(numel).view(shape)
    found = []
    for offsets, sizes in boxes(shape, start, stop):
        box = numbers
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            box = box.narrow(dim, offset, size)
        found.append(box.flatten())
    assert torch.cat(found or [torch.empty(0)]).tolist() == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


def test_a_run_is_filled_and_computed_with_in_place():
    flat = torch.zeros(20)
    shard = FlatShard(flat.narrow(0, 5, 7), 3, (2, 3, 4))
    fill(shard, torch.arange(24.0).view(2, 3, 4))
    assert flat.tolist() == [0.0] * 5 + [3.0, 4, 5, 6, 7, 8, 9] + [0.0] * 8
    local(shard).add_(1)
    assert flat[5] == 4
    with pytest.raises(TypeError, match="local"):
        torch.add(shard, 1)
    held = shard.detach().clone()
    assert isinstance(held, FlatShard)
    local(held).zero_()
    assert flat[5] == 4


@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (1, 1, 1, 6), (1,), ()])
def test_what_some_runs_saved_others_load(tmp_path, shape):
    """One process saves all runs under names of their own, as boxes of one logical tensor, and loads other runs."""
    numel = prod(shape)
    content = torch.randn(shape)
    whole_first = FlatShard(content.flatten().clone(), 0, shape)
    dcp.save({"t": whole_first}, checkpoint_id=tmp_path, no_dist=True)
    for start in range(numel):
        part = FlatShard(torch.zeros(numel - start), start, shape)
        dcp.load({"t": part}, checkpoint_id=tmp_path, no_dist=True)
        assert torch.equal(local(part), content.flatten()[start:])
    plain = torch.zeros(shape)
    dcp.load({"t": plain}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(plain, content)
    assert whole(plain) is plain


def test_a_run_is_saved_from_where_it_lies():
    """Torch's writer copies what is part of a larger storage, and keeps the copies of a whole save."""
    flat = torch.arange(20.0)
    shard = FlatShard(flat.narrow(0, 5, 7), 3, (2, 3, 4))
    for item in shard.__create_write_items__("x", None):
        part = shard.__get_tensor_shard__(item.index)
        assert part.untyped_storage().nbytes() == 4 * part.numel()
        part.add_(1)
    assert flat[5:12].tolist() == list(range(6, 13))
