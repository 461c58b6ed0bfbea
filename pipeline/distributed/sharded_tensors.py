"""Logical tensors: parameters, moments and averages with their full shape, of which this rank may hold a part.

There are three kinds: a plain tensor is whole on every rank, a DTensor is FSDP's shard, a `FlatShard` is ZeRO's.
torch.distributed.checkpoint saves and loads all three in place, and each kind can load a checkpoint of another kind, on
any number of ranks.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


class FlatShard(Tensor):
    """A run of elements of a row-major tensor of `shape`: `local` holds those from `start` on, on this rank.

    Checkpoints know boxes, not runs of elements, so a run presents itself as the few boxes that it consists of. All
    computation uses `local`, a 1-D view of the engine's own memory.
    """

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: Sequence[int]) -> "FlatShard":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)

    def __init__(self, local: Tensor, start: int, shape: Sequence[int]):
        self.local, self.start = local, start
        self._boxes = list(boxes(shape, start, start + local.numel()))

    def like(self, local: Tensor) -> "FlatShard":
        """Return the same run of another tensor of this shape."""
        return FlatShard(local, self.start, self.shape)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "FlatShard":
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return args[0].like(function(args[0].local))
        raise TypeError(f"{function} on a FlatShard: compute with its `local`")

    def __repr__(self, **_: Any) -> str:
        return f"FlatShard({tuple(self.shape)}, {self.start}:{self.start + self.local.numel()})"

    # The interface that torch.distributed.checkpoint requires of a sharded tensor.

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self._boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        position = 0
        for offsets, sizes in self._boxes:
            if torch.Size(offsets) == index.offset:
                part = self.local.narrow(0, position, prod(sizes)).view(sizes)
                # torch's writer copies each view of a larger storage and keeps all copies to the end, which doubles
                # the memory. A tensor made through numpy has a storage of its own with the same bytes.
                return torch.from_numpy(part.numpy()) if part.device.type == "cpu" else part
            position += prod(sizes)
        raise KeyError(f"no part of this shard begins at {index.offset}")


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that together are the elements `start` to `stop` of a row-major tensor, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a logical tensor, to compute with in place."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.local if isinstance(tensor, FlatShard) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a logical tensor whole on every rank. Collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not isinstance(tensor, FlatShard):
        return tensor
    # Add bits as integers, because as numbers -0.0 plus the other ranks' 0.0 would become 0.0.
    bits = {4: torch.int32, 8: torch.int64}[tensor.local.element_size()]
    full = torch.zeros(prod(tensor.shape), dtype=bits, device=tensor.local.device)
    full[tensor.start : tensor.start + tensor.local.numel()] = tensor.local.view(bits)
    dist.all_reduce(full)
    return full.view(tensor.dtype).view(tensor.shape)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Set this rank's part of a logical tensor from a whole `value` of the same shape, of any device and dtype."""
    part = local(tensor)
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            value = value.narrow(dim, min(offset, value.shape[dim]), size)
    elif isinstance(tensor, FlatShard):
        value = value.flatten()[tensor.start : tensor.start + part.numel()]
    part.copy_(value)
