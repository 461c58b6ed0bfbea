"""Plan a save: which rank writes which part of which tensor. Every rank derives the same plan by itself.

torch's planner sends the list of every rank's parts to rank 0, which merges the lists and sends them back while all
ranks wait. But plain tensors and FSDP's shards say themselves who holds what. So a rank sends only a hash of what it
derived the plan from, which must be the same on all ranks, and where its runs of ZeRO's flat partitions lie. The files
are those of torch's planner, and either reads the other's.
"""

import contextlib
import gc
import hashlib
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard

from pipeline.distributed.sharded_tensors import Box, FlatShard, boxes, local
from pipeline.errors import CheckpointError

Holders = tuple[tuple[int, ...], ...]  # of each part of a tensor the ranks that hold it


@dataclass(frozen=True)
class Spread:
    """How a tensor lies on the ranks: it is cut along `dim`, and the ranks `holders[i]` hold its part i.

    dim: None if every holder has the whole tensor.
    holders: empty for a FlatShard, of which each rank knows its own run alone.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    dim: int | None
    holders: Holders

    def part(self, index: int) -> Box:
        """The offsets and sizes of part `index`; FSDP cuts as torch.chunk does, so the last parts may be empty."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        if self.dim is not None:
            length = self.shape[self.dim]
            step = -(-length // len(self.holders))
            offsets[self.dim] = min(index * step, length)
            sizes[self.dim] = min(step, length - offsets[self.dim])
        return tuple(offsets), tuple(sizes)


class StatePlan:
    """The plan for states of one layout, as seen by one rank.

    Args:
        spreads: of all tensors, in the order in which the ranks write them.
        world: the number of ranks.
    """

    def __init__(self, spreads: Sequence[Spread], world: int):
        self.spreads, self.world = spreads, world

    @cached_property
    def digest(self) -> bytes:
        """A hash of what the plan follows from."""
        kinds = {holders: number for number, holders in enumerate({spread.holders: None for spread in self.spreads})}
        lines = [(s.name, tuple(s.shape), str(s.dtype), s.dim, kinds[s.holders]) for s in self.spreads]
        return hashlib.sha256(repr((self.world, list(kinds), lines)).encode()).digest()

    @cached_property
    def writers(self) -> list[list[int]]:
        """For each tensor the ranks that write its parts: of the holders the one with the fewest bytes so far.

        The parts are dealt out as torch's planner does it: it begins with those that rank 0 holds, and counts for each
        part the bytes of the whole tensor.
        """
        writers = [[min(holders) for holders in spread.holders] for spread in self.spreads]
        load = [0] * self.world
        shared = [
            (min(holders), tensor, part)
            for tensor, spread in enumerate(self.spreads)
            for part, holders in enumerate(spread.holders)
            if len(holders) > 1 or holders[0] == 0
        ]
        for _, tensor, part in sorted(shared):
            spread = self.spreads[tensor]
            writer = min(spread.holders[part], key=load.__getitem__)
            load[writer] += prod(spread.shape) * spread.dtype.itemsize or 1
            writers[tensor][part] = writer
        return writers

    def items(self, rank: int, tensors: Mapping[str, torch.Tensor]) -> list[WriteItem]:
        """What `rank` writes of `tensors`."""
        return [
            make_write_item(spread, tensors[spread.name], box)
            for spread, writers in zip(self.spreads, self.writers, strict=True)
            for box in self._own_boxes(spread, writers, rank, tensors[spread.name])
        ]

    def _own_boxes(self, spread: Spread, writers: list[int], rank: int, tensor: torch.Tensor) -> Iterable[Box]:
        if isinstance(tensor, FlatShard):
            return boxes(tensor.shape, tensor.start, tensor.start + tensor.local.numel())
        own = (spread.part(part) for part, writer in enumerate(writers) if writer == rank)
        return (box for box in own if prod(box[1]))

    def metadata(self, runs: Sequence[bytes], files: Sequence[tuple[str, bytes]]) -> bytes:
        """The content of DCP's .metadata.

        Args:
            runs: of each rank the starts and lengths of its FlatShards.
            files: of each rank its file's name and the places of the parts in it, in the order of `items`.

        Raises:
            CheckpointError: if a part is missing, or if more was written than planned.
        """
        runs_of_ranks = [iter(unpack_pairs(run)) for run in runs]
        places = [iter(unpack_pairs(packed)) for _, packed in files]
        sizes: dict[tuple[int, ...], torch.Size] = {}  # shared, because pickle writes an object once
        tensors, storage = {}, {}
        for spread, writers in zip(self.spreads, self.writers, strict=True):
            chunks: list[ChunkStorageMetadata] = []
            for writer, (offsets, shape) in self.all_boxes(spread, writers, runs_of_ranks):
                place = next(places[writer], None)
                if place is None:
                    raise CheckpointError(f"rank {writer} did not write its part of {spread.name}; save again")
                offset = sizes.setdefault(offsets, torch.Size(offsets))
                index = MetadataIndex(spread.name, index=len(chunks))
                object.__setattr__(index, "offset", offset)
                chunks.append(ChunkStorageMetadata(offset, sizes.setdefault(shape, torch.Size(shape))))
                storage[index] = _StorageInfo(files[writer][0], *place)
            written = sum(prod(chunk.sizes) for chunk in chunks)
            if written != prod(spread.shape):
                raise CheckpointError(
                    f"the ranks hold {written} of the {prod(spread.shape)} numbers of {spread.name}; its shards do not"
                    " fit each other"
                )
            properties = TensorProperties(dtype=spread.dtype)
            tensors[spread.name] = TensorStorageMetadata(properties, spread.shape, chunks)
        if any(next(left, None) for left in places):
            raise CheckpointError("a rank wrote more than was planned; save again")
        names = {spread.name: (spread.name,) for spread in self.spreads}
        return pickle.dumps(Metadata(tensors, names, storage, version=CURRENT_DCP_VERSION))

    def all_boxes(self, spread: Spread, writers: list[int], runs: Sequence[Any]) -> Iterable[tuple[int, Box]]:
        """Yield the rank that writes each part of a tensor, and the part; takes from the ranks' iterators of `runs`."""
        if spread.holders:
            parts = ((writer, spread.part(part)) for part, writer in enumerate(writers))
            yield from ((writer, box) for writer, box in parts if prod(box[1]))
            return
        for rank, run in enumerate(runs):
            start, length = next(run)
            yield from ((rank, box) for box in boxes(spread.shape, start, start + length))


def make_write_item(spread: Spread, tensor: torch.Tensor, box: Box) -> WriteItem:
    """DCP's order to write one part of a tensor."""
    offsets, sizes = map(torch.Size, box)
    return WriteItem(
        index=MetadataIndex(spread.name, offsets),
        type=WriteItemType.SHARD if isinstance(tensor, DTensor | FlatShard) else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties.create_from_tensor(local(tensor)),
            size=spread.shape,
        ),
    )


def pack_pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Encode pairs of numbers, 16 bytes each."""
    return array("q", (number for pair in pairs for number in pair)).tobytes()


def unpack_pairs(packed: bytes) -> Iterable[tuple[int, int]]:
    """Decode what `pack_pairs` has encoded."""
    numbers = array("q", packed)
    return zip(numbers[::2], numbers[1::2], strict=True)


class Plans:
    """The plans of one store: the last one is kept, because a stage's state hardly ever changes its layout.

    Nothing that a rank keeps is believed by another one: each save compares the ranks' hashes, runs and places.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self._plan = StatePlan([], world)
        self._runs, self._items = b"", list[WriteItem]()
        self._metadata: tuple[tuple, bytes] = (), b""
        # For each mesh and placement the holders of each part, and which part this rank holds.
        self._meshes: dict[Any, tuple[Holders, int | None]] = {}
        self._everyone: Holders = (tuple(range(world)),)

    def plan(self, tensors: Mapping[str, torch.Tensor]) -> tuple[StatePlan, list[WriteItem], bytes]:
        """The plan for `tensors`, what this rank writes, and where its runs of FlatShards lie."""
        spreads = [self._spread(name, tensor) for name, tensor in tensors.items()]
        runs = pack_pairs((t.start, t.local.numel()) for t in tensors.values() if isinstance(t, FlatShard))
        if spreads != self._plan.spreads:
            self._plan, self._runs = StatePlan(spreads, self.world), b"none"
        if runs != self._runs:
            self._runs, self._items = runs, self._plan.items(self.rank, tensors)
        return self._plan, self._items, runs

    def _spread(self, name: str, tensor: torch.Tensor) -> Spread:
        if isinstance(tensor, FlatShard):
            return Spread(name, tensor.shape, tensor.dtype, None, ())
        if not isinstance(tensor, DTensor):
            return Spread(name, tensor.shape, tensor.dtype, None, self._everyone)
        key = tensor.device_mesh, tensor.placements
        if key not in self._meshes:
            holders = _holders(*key)
            own = next((part for part, ranks in enumerate(holders) if self.rank in ranks), None)
            self._meshes[key] = holders, own
        holders, own = self._meshes[key]
        dim = next((placement.dim for placement in tensor.placements if type(placement) is Shard), None)
        spread = Spread(name, tensor.shape, tensor.dtype, dim, holders)
        if own is None or tuple(tensor.to_local().shape) != spread.part(own)[1]:
            raise CheckpointError(f"{name} lies on the ranks as {tensor.placements}, which checkpoints do not know")
        return spread

    def metadata(self, plan: StatePlan, runs: Sequence[bytes], files: Sequence[tuple[str, bytes]]) -> bytes:
        """`plan.metadata`, which is the same again for most saves."""
        key = (plan.digest, tuple(runs), tuple(files))
        if self._metadata[0] != key:
            with _without_garbage_collection():
                self._metadata = key, plan.metadata(runs, files)
        return self._metadata[1]


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Do not look for cycles meanwhile: among a million new objects of the metadata there are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _holders(mesh: Any, placements: Sequence[Any]) -> Holders:
    """The ranks that hold each part of a DTensor with at most one sharded dimension of its mesh."""
    sharded = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(type(placements[dim]) is not Shard for dim in sharded):
        return ()
    ranks = mesh.mesh
    parts = ranks.movedim(sharded[0], 0).flatten(1) if sharded and ranks.ndim > 1 else ranks.reshape(-1, 1)
    return tuple(map(tuple, (parts if sharded else ranks.reshape(1, -1)).tolist()))


class Planner(DefaultSavePlanner):
    """Plans one save with the `Plans` of its store. Only hashes, and the runs of FlatShards, go through rank 0."""

    def __init__(self, plans: Plans):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.plans = plans
        self.runs: list[bytes] = []  # of all ranks, on rank 0

    def create_local_plan(self) -> SavePlan:
        self.state, self._items, runs = self.plans.plan(self.state_dict)
        return SavePlan([], planner_data=(self.state.digest, runs))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        for rank, plan in enumerate(all_plans):
            if plan.planner_data[0] != self.state.digest:
                raise CheckpointError(
                    f"rank {rank} holds other tensors than rank 0; use the same recipe and program on all ranks"
                )
        self.runs = [plan.planner_data[1] for plan in all_plans]
        # The writer's `finish` makes the real metadata; torch would send it to all ranks, which do not need it.
        return [SavePlan([]) for _ in all_plans], Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plan = SavePlan(self._items, storage_data=new_plan.storage_data)
        return self.plan

    def metadata(self, files: Sequence[tuple[str, bytes]]) -> bytes:
        """The content of .metadata, on rank 0, from each rank's file and the places of the parts in it."""
        return self.plans.metadata(self.state, self.runs, files)
