"""Count the bytes that the kernels of a step read and write, from the operators that a trace has seen.

Run eagerly, each operator is a kernel: it reads its inputs and writes its outputs once. In a compiled block operators
between matrix products, convolutions and own kernels are fused. `fuse` models that as follows:

- A fused kernel has all pointwise operators and reductions that can run in one pass over the features. A reduction
  along the channels, as LayerNorm's, is part of a pass; what uses a reduction over sites, as GRN's, is another pass.
- It reads each tensor that it does not make once, and writes each that something outside needs.
- A tensor is not written but computed again where it is needed, if what it is made of has no more bytes than itself.
- A reduction over sites beside one along channels reads its inputs again, as LayerNorm's gradients of weights do.

Matrix products and convolutions read and write each operand once. Own kernels read what their loops read again and no
cache can hold: see `PASSES`. Parts of a tensor that lie in a cache by chance are counted as read from memory.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

GROUPS = ("matrix products", "depthwise", "GELU and GRN", "LayerNorm", "other pointwise", "casts of weights", "input")
MATRIX, DEPTHWISE, RESPONSE, NORM, POINTWISE, WEIGHTS, INPUT = range(len(GROUPS))

# How often an own kernel reads its inputs of the features' size.
PASSES = {"fcmae.gelu_grn": 2, "fcmae.gelu_grn_backward": 2}
# Reads that depend on where regions lie are counted once: of RoIAlign the maps forward, the regions backward.
# Of the depthwise kernels, by direction: instructions that a warp issues for each that multiplies and adds, from the
# code that is compiled for sm_90 (upper limits, held by a test).
INSTRUCTIONS = {"forward": 75 / 16, "backward": (75 + 90) / 2 / 16}

_MATRIX = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "convolution_backward"}
_RESPONSE = {"gelu", "gelu_backward", "pow", "square", "addcmul", "mul", "sum", "sqrt", "mean", "div", "where", "gt"}
_NORMS = {"native_layer_norm", "native_layer_norm_backward"}
_REDUCTIONS = {"sum", "mean", "var", "var_mean", "amax", "norm", "std", "linalg_vector_norm"}
_OVERWRITTEN = {"copy_", "zero_", "fill_"}


class Operation(NamedTuple):
    """One operator of a trace."""

    name: str
    reads: tuple[tuple[int, int], ...]
    """(number of the storage, bytes) of each tensor."""
    writes: tuple[tuple[int, int], ...]
    flops: int
    block: tuple[int, str] | None
    """The pass through a block that it belongs to; None outside of blocks."""
    repeats: int
    """How often it stands for itself and its like."""
    group: int
    opaque: bool
    """A kernel of its own, whatever is around it."""
    barrier: bool
    """A reduction over sites: what uses its result cannot be in the same pass."""


class Kernels(NamedTuple):
    """int64 arrays, one element a kernel."""

    group: np.ndarray
    """Index in GROUPS."""
    repeats: np.ndarray
    bytes: np.ndarray
    flops: np.ndarray
    slots: np.ndarray
    """Operations that the units could have done while the kernel issues its instructions."""


class OperationLog:
    """Collects the operators of a trace.

    Args:
        parameters: storages of the model's parameters, by address of torch's object.
    """

    def __init__(self, parameters: set[int]):
        self.operations: list[Operation] = []
        self.gradients: set[int] = set()
        self.block: tuple[int, str] | None = None
        self.repeats = 1
        self.began = False
        """Whether the model has been reached: before, the input is prepared."""
        self._numbers: dict[int, int] = {key: -1 - i for i, key in enumerate(parameters)}
        self._next = 0

    def number(self, key: int) -> int:
        """The number of a storage; negative of the model's own."""
        if key not in self._numbers:
            self._numbers[key], self._next = self._next, self._next + 1
        return self._numbers[key]

    def forget(self, key: int) -> None:
        """The storage was freed: another one may get the same address."""
        self._numbers.pop(key, None)

    def add(self, function: Any, args: tuple, kwargs: Mapping[str, Any], out: Any, flops: int) -> None:
        """Note what an operator reads and writes on the device."""
        name, written = _traits(function)
        inputs = _tensors((args, tuple(kwargs.values())))
        keys = {t.untyped_storage()._cdata for t in inputs}
        if written:
            changed = _tensors(tuple(_argument(place, args, kwargs) for place in written))
            made = changed
            if name in _OVERWRITTEN or any(isinstance(place, str) for place in written):
                inputs = [t for t in inputs if not any(t is c for c in changed)]
        else:
            made = [t for t in _tensors((out,)) if t.untyped_storage()._cdata not in keys]
        if not made or name.startswith(("empty", "new_empty")):
            return  # a view, or memory without values
        depthwise = _is_depthwise(name, args)
        opaque = depthwise or name in _MATRIX or name.startswith(("fcmae.", "_scaled_dot_product"))
        reads, writes = self._sizes(inputs), self._sizes(made)
        weights = name == "_to_copy" and (reads and reads[0][0] < 0)
        if depthwise:
            group = DEPTHWISE
        elif name.startswith("fcmae."):
            group = NORM if "layer_norm" in name else RESPONSE if "grn" in name else POINTWISE
        elif opaque:
            group = MATRIX
        elif weights:
            group = WEIGHTS
        elif name in _NORMS:
            group = NORM
        elif not self.began:
            group = INPUT
        else:
            group = RESPONSE if self.block and name in _RESPONSE else POINTWISE
        barrier = name in _REDUCTIONS and not _along_channels(args)
        self.operations.append(Operation(name, reads, writes, flops, self.block, self.repeats, group, opaque, barrier))

    def _sizes(self, tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        return tuple((self.number(t.untyped_storage()._cdata), _bytes(t)) for t in tensors)

    def finish(self) -> list[Operation]:
        """The operators, of which those that cast gradients of parameters are known now."""
        return [
            o._replace(group=WEIGHTS) if o.name == "_to_copy" and o.writes[0][0] in self.gradients else o
            for o in self.operations
        ]


@cache
def _traits(function: Any) -> tuple[str, tuple[int | str, ...]]:
    """The name of an operator, and the places or names of the arguments that it writes."""
    schema = function._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    places: list[int | str] = [i for i, a in enumerate(positional) if a.alias_info and a.alias_info.is_write]
    places += [a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]
    packet = function._overloadpacket.__name__
    namespace = function.namespace
    return packet if namespace == "aten" else f"{namespace}.{packet}", tuple(places)


def _argument(place: int | str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Find the tensors on the device among the arguments of an operator, also inside lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.is_meta else []
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _bytes(tensor: Tensor) -> int:
    """Of the elements that a tensor has; those that `expand` repeats count once."""
    elements = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return min(elements * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_depthwise(name: str, args: tuple) -> bool:
    if name.startswith("fcmae."):
        return "depthwise" in name
    weight = {"convolution": 1, "convolution_backward": 2}.get(name)
    return weight is not None and args[weight].shape[0] > 1 == args[weight].shape[1]


def _along_channels(args: tuple) -> bool:
    """Whether a reduction is over the last axis alone."""
    dims = args[1] if len(args) > 1 and isinstance(args[1], list | tuple | int) else None
    x = args[0]
    dims = [dims] if isinstance(dims, int) else dims
    return bool(dims) and all(d % x.ndim == x.ndim - 1 for d in dims)


def count_eager(operations: Sequence[Operation]) -> Kernels:
    """Each operator is a kernel."""
    return _table(list(map(_own_kernel, operations)))


def count_fused(operations: Sequence[Operation]) -> Kernels:
    """The operators of each pass through a block are fused where they can be; those outside of blocks are not."""
    fusion = _Fusion(operations)
    passes: dict[tuple[int, str], list[int]] = defaultdict(list)
    rows = []
    for index, operation in enumerate(operations):
        if operation.block is None or operation.group == WEIGHTS:
            rows.append(_own_kernel(operation))
        else:
            passes[operation.block].append(index)
    for indices in passes.values():
        rows += fusion.fuse(indices)
    return _table(rows)


Row = tuple[int, int, int, int, int]


def _table(rows: Sequence[Row]) -> Kernels:
    return Kernels(*np.array(rows, np.int64).reshape(-1, 5).T.copy())


def _own_kernel(o: Operation) -> Row:
    read, written = sum(size for _, size in o.reads), sum(size for _, size in o.writes)
    slots = o.flops
    if o.group == DEPTHWISE:
        direction = "backward" if "backward" in o.name else "forward"
        slots = int(o.flops * INSTRUCTIONS[direction])
        if direction == "backward":
            # Two kernels: the gradient of the input reads the gradient, that of the weight reads it and the input.
            read += o.reads[0][1]
    elif o.name in PASSES:
        largest = max(size for _, size in o.reads)
        read += (PASSES[o.name] - 1) * sum(size for _, size in o.reads if 2 * size >= largest)
    return o.group, o.repeats, read + written, o.flops, slots


class _Fusion:
    """The model of a compiler; see the top of this file.

    Args:
        operations: all of a step, because the backward pass reads what the forward pass made.
    """

    def __init__(self, operations: Sequence[Operation]):
        self._operations = operations
        self._readers: dict[int, list[int]] = defaultdict(list)
        self._sizes: dict[int, int] = defaultdict(int)
        for index, operation in enumerate(operations):
            for value, size in operation.reads:
                self._readers[value].append(index)
                self._sizes[value] = max(self._sizes[value], size)
            for value, size in operation.writes:
                self._sizes[value] = max(self._sizes[value], size)
        # What is read instead of a value that is not written.
        self._sources: dict[int, frozenset[int]] = {}

    def fuse(self, indices: Sequence[int]) -> list[Row]:
        """The kernels of one pass through a block."""
        level = self._levels(indices)
        passes: dict[int, _Pass] = defaultdict(_Pass)
        rows = []
        for index in indices:
            operation = self._operations[index]
            if operation.opaque:
                rows.append(_own_kernel(operation))
                continue
            one = passes[level[index]]
            inputs = frozenset().union(
                *(one.made.get(value) or self._sources.get(value) or {value} for value, _ in operation.reads)
            )
            one.operations.append(operation)
            for value, _ in operation.writes:
                one.made[value] = inputs
                outside = [i for i in self._readers[value] if level.get(i) != level[index] or self._is_apart(i)]
                if self._must_be_written(value, operation, inputs, outside):
                    one.written.add(value)
                    one.read |= inputs
                    one.again |= inputs if operation.name == "native_layer_norm_backward" else set()
                elif outside:
                    self._sources[value] = inputs
        for one in passes.values():
            size = sum(self._sizes[value] for values in (one.read, one.again, one.written) for value in values)
            rows.append((_name(one.operations), one.operations[0].repeats, size, 0, 0))
        return rows

    def _is_apart(self, index: int) -> bool:
        operation = self._operations[index]
        return operation.opaque or operation.block is None or operation.group == WEIGHTS

    def _must_be_written(self, value: int, o: Operation, inputs: frozenset[int], outside: Sequence[int]) -> bool:
        """Whether a value is written: it is neither needed by its own pass alone nor computed again elsewhere."""
        if not outside:
            return not self._readers[value]
        apart = any(self._is_apart(index) for index in outside)
        return apart or o.barrier or sum(self._sizes[v] for v in inputs) > self._sizes[value]

    def _levels(self, indices: Sequence[int]) -> dict[int, int]:
        """The pass over the features in which each operator can run first."""
        ready: dict[int, int] = {}
        level = {}
        for index in indices:
            operation = self._operations[index]
            level[index] = max((ready.get(value, 0) for value, _ in operation.reads), default=0)
            for value, _ in operation.writes:
                ready[value] = level[index] + (operation.opaque or operation.barrier)
        return level


class _Pass:
    """A fused kernel."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.made: dict[int, frozenset[int]] = {}
        """By value: what the kernel reads to make it."""
        self.read: set[int] = set()
        self.again: set[int] = set()
        self.written: set[int] = set()


def _name(operations: Sequence[Operation]) -> int:
    groups = {operation.group for operation in operations}
    return next((group for group in (RESPONSE, NORM) if group in groups), POINTWISE)
