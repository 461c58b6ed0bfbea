"""Trace the activations' memory and the arithmetic of a training step: there is no formula; memory.py adds the state.

The real model runs on the meta device, which has shapes and no memory. The trace counts the allocations that torch's
operators ask for; it sees neither what a kernel uses inside itself nor what an allocator wastes. Autocast does not
exist on the meta device, so `DeviceCasts` casts as the site's device would.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from pipeline.cost.block_repeats import BlockMarks, repeat_segments, shorten
from pipeline.cost.kernel_bytes import OperationLog, count_eager, count_fused
from pipeline.cost.trace_cache import kept
from pipeline.data.batch import example_batch, example_evaluation_batch
from pipeline.engines.base import DTYPES
from pipeline.engines.norm_groups import play_norm_groups
from pipeline.kernels.triton_support import meta_stands_for_gpu
from pipeline.models import BLOCKS
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe

NORM_MACS_PER_ELEMENT = 5  # of LayerNorm, as the published figures count it beside convolutions and linear layers
# Functions that autocast runs in bf16, and those that it runs in fp32 on each type of device.
_LOW_PRECISION = (F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention)
_FULL_PRECISION = {"cpu": (), "cuda": (torch.layer_norm, F.layer_norm, F.cross_entropy)}


@dataclass(frozen=True)
class Trace:
    """Forward and backward pass of one micro-batch. Where ranks share a norm group, it depends on their number."""

    images: int
    timeline: np.ndarray
    """int64 (allocations, 2): bytes of activations and of unsharded gradients that are alive after each allocation."""
    forward_macs: int
    """Multiply-adds of convolutions, linear layers and attention."""
    backward_macs: int
    """The same of the backward pass, with what activation checkpointing computes again."""
    norm_macs: int
    """`NORM_MACS_PER_ELEMENT` for each output element of a LayerNorm in the forward pass."""
    eager: np.ndarray
    """int64 (5, kernels): the fields of `Kernels`, with a kernel for each operator; none on CPUs and in evaluations."""
    fused: np.ndarray
    """The same with compiled blocks."""

    @property
    def published_macs(self) -> float:
        """Multiply-adds of a forward pass of one image, as ConvNeXt V2's tables count them."""
        return (self.forward_macs + self.norm_macs) / self.images

    @property
    def training_macs(self) -> float:
        """Multiply-adds of one image, forward and backward."""
        return (self.forward_macs + self.backward_macs) / self.images

    def peak_bytes(self, gradients: bool) -> int:
        """Return the most bytes of activations that are alive at once; with the gradients of that moment, if asked."""
        return int(self.timeline.sum(1).max() if gradients else self.timeline[:, 0].max())


def meta_model(recipe: StageRecipe) -> tuple[Objective, nn.Module]:
    """Build the stage's objective and model on the meta device."""
    objective = create_objective(recipe, seed=0)
    with torch.device("meta"):
        return objective, objective.build_model().to(DTYPES[recipe.engine.precision])


def trace_step(recipe: StageRecipe, device: str, ranks: int = 1) -> Trace:
    """Trace a micro-batch of the recipe's size as a device of type "cpu" or "cuda" would compute it."""
    live, forward_macs, norm_macs = _follow_step(recipe, device, ranks)
    images = recipe.batch.slot * recipe.batch.micro_slots
    operations = live.log.finish() if live.log else ()
    return Trace(
        images, live.levels(), forward_macs, live.macs - forward_macs, norm_macs, np.stack(count_eager(operations)),
        np.stack(count_fused(operations)),
    )  # fmt: skip


def _follow_step(recipe: StageRecipe, device: str, ranks: int = 1) -> "tuple[_Live, int, int]":
    """Follow a step; return also the multiply-adds of the forward pass and those of its norms."""
    objective, model = meta_model(recipe)
    batch = example_batch(recipe).to(torch.device("meta"))
    play_norm_groups(model, recipe, ranks, len(batch.images))
    live = _Live(model, log=device == "cuda")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(live.is_gradient)
    with _kernels_of(device), DeviceCasts(device, recipe.engine.precision), live:
        loss = objective.loss(model, batch, 0)
        forward_macs, norm_macs = live.macs, live.norm_macs
        live.marks.backward = True
        run_backward(loss)
    return live, forward_macs, norm_macs


def _kernels_of(device: str) -> AbstractContextManager:
    return meta_stands_for_gpu() if device == "cuda" else nullcontext()


def run_backward(loss: Tensor) -> None:
    """Run the backward pass of a 0-dim loss under the modes that are active.

    Not loss.backward(): that is a torch function itself, so it would run with `DeviceCasts` off, and so would the
    forward passes that checkpointing repeats.
    """
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def trace_evaluation(recipe: StageRecipe, device: str) -> Trace:
    """Trace the forward pass of an evaluation batch."""
    return _kept("evaluation", _trace_evaluation, recipe, device)


def _kept(kind: str, trace: Callable[[StageRecipe, str], Trace], recipe: StageRecipe, device: str) -> Trace:
    """The trace, from the user's cache if it was made before."""
    arrays = kept(
        kind, recipe, device, lambda: {name: np.asarray(v) for name, v in vars(trace(recipe, device)).items()}
    )
    return Trace(**{name: array if array.ndim else int(array) for name, array in arrays.items()})


def _trace_evaluation(recipe: StageRecipe, device: str) -> Trace:
    objective, model = meta_model(recipe)
    batch = example_evaluation_batch(recipe).to(torch.device("meta"))
    live = _Live(model)
    with _kernels_of(device), DeviceCasts(device, recipe.engine.precision), live, torch.no_grad():
        objective.evaluate(model.eval(), batch)
    return Trace(len(batch.labels), live.levels(), live.macs, 0, live.norm_macs, *[np.stack(count_eager(()))] * 2)


class StepTraces:
    """Traces of a step with any number of slots in a micro-batch, called with that number.

    Every allocation is a constant plus a part for each image, so two traces give all others. On a CPU some operators
    work in pieces of the cache's size, so the number of allocations depends on the batch; then each size is traced, as
    it is with norm groups, because they count any number of slots.
    """

    def __init__(self, recipe: StageRecipe, device: str, ranks: int = 1):
        self._recipe, self._device, self._ranks = recipe, device, ranks
        self._traces: dict[int, Trace] = {}

    def __call__(self, micro_slots: int) -> Trace:
        if micro_slots in self._traces or micro_slots <= 2 or self._recipe.norm_group_images is not None:
            return self._trace(micro_slots)
        one, two = self._trace(1), self._trace(2)
        arrays = ("timeline", "eager", "fused")
        alike = all(getattr(one, name).shape == getattr(two, name).shape for name in arrays)
        if alike:

            def extrapolate(first: Any, second: Any) -> Any:
                return first + (micro_slots - 1) * (second - first)

            return Trace(*(extrapolate(getattr(one, f.name), getattr(two, f.name)) for f in fields(Trace)))
        return self._trace(micro_slots)

    def _trace(self, micro_slots: int) -> Trace:
        if micro_slots not in self._traces:
            recipe = self._recipe.with_micro_slots(micro_slots)
            group = recipe.norm_group_on(self._ranks)
            kind = f"step with {group}" if group else "step"
            self._traces[micro_slots] = _kept(kind, lambda *of: trace_step(*of, self._ranks), recipe, self._device)
        return self._traces[micro_slots]


class _Live(TorchDispatchMode):
    """Follow every storage that an operator makes until it is freed, and count multiply-adds.

    Args:
        model: on the meta device. Long rows of equal blocks are shortened, and counted as if they were not.
        log: whether to note every operator.
    """

    def __init__(self, model: nn.Module, log: bool = False) -> None:
        super().__init__()
        self.timeline: list[tuple[int, int]] = [(0, 0)]
        self.macs = self.norm_macs = 0
        self._bytes = [0, 0]
        self._watched: dict[int, weakref.ref] = {}
        self._standing = shorten(model)  # first, because activations get the addresses of what is freed here
        # Of each storage: 0 activation, 1 gradient, 2 of the model, whose views are no new memory.
        own = [*model.parameters(), *model.buffers()]
        self._kind = {tensor.untyped_storage()._cdata: 2 for tensor in own}
        self.log = OperationLog(set(self._kind)) if log else None
        self._repeats, self._segments, self._open = 1, {}, None
        blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
        self._numbers = {block: number for number, block in enumerate(blocks)}
        self.marks = BlockMarks(blocks, self._begin, self._end)
        if self.log:  # what comes before the model prepares its input
            model.register_forward_pre_hook(lambda *_: setattr(self.log, "began", True))

    def levels(self) -> np.ndarray:
        """The timeline, with what stands for other blocks repeated."""
        return repeat_segments(np.array(self.timeline, np.int64), self._segments)

    def _begin(self, block: nn.Module, direction: str) -> None:
        self._end()
        self._repeats = self._standing.get(block, 1)
        if self._repeats > 1:
            self._open = len(self.timeline)
        if self.log:
            self.log.block, self.log.repeats = (self._numbers[block], direction), self._repeats

    def _end(self) -> None:
        if self._open is not None:
            self._segments[self._open, len(self.timeline)] = self._repeats
        self._repeats, self._open = 1, None
        if self.log:
            self.log.block, self.log.repeats = None, 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        with (
            torch._C.DisableTorchFunction()
        ):  # else `DeviceCasts` sees each `tensor.shape` below, hundreds of thousands
            return self._follow(function, args, kwargs or {})

    def _follow(self, function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        out = _run(function, args, kwargs)
        packet = function._overloadpacket
        macs = _MACS[packet](*args, **kwargs, out_val=out) if packet in _MACS else 0
        self.macs += macs * self._repeats
        if packet in _NORMS:
            self.norm_macs += NORM_MACS_PER_ELEMENT * out[0].numel() * self._repeats
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        if self.log:
            self.log.add(function, args, kwargs, out, 2 * macs)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._kind:
            self._kind[key] = 0
            self._bytes[0] += storage.nbytes()
            self._watched[key] = weakref.ref(storage, partial(self._free, key, storage.nbytes()))
            self.timeline.append((self._bytes[0], self._bytes[1]))

    def _free(self, key: int, size: int, _: weakref.ref) -> None:
        del self._watched[key]
        self._bytes[self._kind.pop(key)] -= size
        if self.log:
            self.log.forget(key)

    def is_gradient(self, parameter: Tensor) -> None:
        storage = parameter.grad.untyped_storage()
        if self._kind.get(storage._cdata) == 0:
            self._kind[storage._cdata] = 1
            self._bytes[0] -= storage.nbytes()
            self._bytes[1] += storage.nbytes()
        if self.log:
            self.log.gradients.add(self.log.number(storage._cdata))


# By operator and arguments: the kind of sequence that it returned, None if a tensor, and (size, strides, type) of each.
_known: dict[Any, tuple[type | None, tuple]] = {}


def _run(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Call an operator, or make what it made of equal arguments before.

    On the meta device torch computes shapes in Python, half a millisecond for each operator, and a model repeats most
    of them in every block.
    """
    key = _key((function, args, tuple(kwargs.items())))
    if key is None or not _is_functional(function):
        return function(*args, **kwargs)
    if key in _known:
        kind, shapes = _known[key]
        made = [shape and torch.empty_strided(*shape[:2], dtype=shape[2], device="meta") for shape in shapes]
        return kind(made) if kind else made[0]
    out = function(*args, **kwargs)
    outs = out if isinstance(out, tuple | list) else (out,)
    taken = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
    if all(each is None or _is_whole(each, taken) for each in outs):
        shapes = tuple(None if each is None else (tuple(each.shape), each.stride(), each.dtype) for each in outs)
        _known[key] = type(out) if isinstance(out, tuple | list) else None, shapes
    return out


def _key(value: Any) -> Any:
    """What an operator's result on the meta device depends on, hashable; None if it depends on more."""
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            return None
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, tuple | list):
        keys = tuple(map(_key, value))
        return None if None in keys else keys
    return type(value), value  # 1, 1.0 and True are equal, and give tensors of different types


@cache
def _is_functional(function: Any) -> bool:
    """Whether an operator changes none of its arguments, and returns no views of them."""
    schema = function._schema
    return not any(each.alias_info for each in (*schema.arguments, *schema.returns))


def _is_whole(out: Any, taken: set[int]) -> bool:
    """Whether a tensor fills a storage of its own, as `torch.empty_strided` would make it; `taken` are others'."""
    if not isinstance(out, Tensor) or out.device.type != "meta" or out.storage_offset():
        return False
    if out.untyped_storage()._cdata in taken:  # _unsafe_view does not say that it returns a view
        return False
    taken.add(out.untyped_storage()._cdata)
    same = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    return same.untyped_storage().nbytes() == out.untyped_storage().nbytes()


class DeviceCasts(TorchFunctionMode):
    """Make meta tensors behave like those of a device: cast like its autocast, and answer `is_cuda`.

    Some operators work on a GPU at once and on a CPU in parts.
    """

    def __init__(self, device: str, precision: str):
        super().__init__()
        self._device, self._low = device, precision.startswith("bf16")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:  # a new object at each access: never identical
            return self._device == "cuda"
        if self._low:
            if function in _LOW_PRECISION or function in (_OWN.depthwise.default, _OWN.depthwise_maps.default):
                args, kwargs = _cast((args, kwargs), torch.bfloat16)
            elif function in _FULL_PRECISION[self._device]:
                args, kwargs = _cast((args, kwargs), torch.float32)
        return function(*args, **kwargs)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def to(value: Any) -> Any:
        wrong = isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in (dtype, torch.float64)
        return value.to(dtype) if wrong else value

    return tree_map(to, values)


def _halves(flops: Callable[..., int]) -> Callable[..., int]:
    """Turn torch's count of operations into multiply-adds: it counts each as two."""
    return lambda *args, **kwargs: flops(*args, **kwargs) // 2


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    # torch's own count is too large by the number of channels for a depthwise weight's gradient.
    transposed, mask = rest[4], rest[7]
    sites = (x if transposed else gradient).shape
    return sum(mask[:2]) * weight.numel() * sites[0] * sites[2:].numel()


def _token_macs(x: Tensor, weight: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Count every tap of a token, those in hidden cells too."""
    return x.shape[0] * weight.numel()


def _map_macs(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * x.shape[2:].numel() * weight.numel()


_ATEN, _OWN = torch.ops.aten, torch.ops.fcmae
_NORMS = {_ATEN.native_layer_norm, _OWN.layer_norm}
_MACS: dict[Any, Callable[..., int]] = {
    **{operator: _halves(flops) for operator, flops in flop_registry.items()},
    _ATEN.convolution_backward: _convolution_backward,
    _OWN.depthwise: _token_macs,
    _OWN.depthwise_backward: lambda gradient, x, weight, *_, out_val, **__: 2 * _token_macs(x, weight, out_val=None),
    _OWN.depthwise_maps: lambda x, weight, *_, out_val, **__: _map_macs(x, weight),
    _OWN.depthwise_maps_backward: lambda gradient, x, weight, *_, out_val, **__: 2 * _map_macs(x, weight),
}
