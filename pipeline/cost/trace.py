"""What a training step computes and keeps, from a run of the real model on the meta device: shapes without memory.

Counted are torch's own allocations, as its operators ask for them: what a kernel uses inside itself is not seen, nor
what an allocator wastes. Autocast does not exist on the meta device, so `_Device` casts as the site's device would.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from pipeline.data.batch import example_batch
from pipeline.engines.base import DTYPES
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe

NORM_MACS_PER_ELEMENT = 5  # how the published figures count LayerNorm, beside convolutions and linear layers
_LOW_PRECISION = (F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention)
_FULL_PRECISION = {"cpu": (), "cuda": (torch.layer_norm, F.layer_norm, F.cross_entropy)}


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forward and backward; nothing in it grows with the number of ranks."""

    images: int
    timeline: np.ndarray
    """int64 (allocations, 2): bytes of activations and of whole gradients that are alive after each allocation."""
    forward_macs: int
    """Multiply-adds of convolutions, linear layers and attention."""
    backward_macs: int
    """With what activation checkpointing computes again."""
    norm_macs: int
    """`NORM_MACS_PER_ELEMENT` for each element that a LayerNorm of the forward pass puts out."""

    @property
    def published_macs(self) -> float:
        """Of a forward pass of one image, as ConvNeXt V2's tables count them."""
        return (self.forward_macs + self.norm_macs) / self.images

    @property
    def training_macs(self) -> float:
        """Of one image, forward and backward."""
        return (self.forward_macs + self.backward_macs) / self.images

    def peak_bytes(self, gradients: bool) -> int:
        """The most that is alive at once: activations alone, or with the gradients that exist at that moment."""
        return int(self.timeline.sum(1).max() if gradients else self.timeline[:, 0].max())


def meta_model(recipe: StageRecipe) -> tuple[Objective, nn.Module]:
    """The stage's objective and model, without memory."""
    objective = create_objective(recipe, seed=0)
    with torch.device("meta"):
        return objective, objective.build_model().to(DTYPES[recipe.engine.precision])


def trace_step(recipe: StageRecipe, device: str) -> Trace:
    """Trace a micro-batch of the recipe's size as a device of type "cpu" or "cuda" would compute it."""
    objective, model = meta_model(recipe)
    batch = example_batch(recipe)
    batch = replace(batch, images=batch.images.to("meta"), labels=batch.labels.to("meta"))
    live = _Live(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(live.is_gradient)
    with _Device(device, recipe.engine.precision), live:
        loss = objective.loss(model, batch, 0)
        forward_macs, norm_macs = live.macs, live.norm_macs
        # What backward() does, less the detour that would take it, and what is computed again in it, out of the mode.
        start = (torch.ones_like(loss),)
        _engine_run_backward((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)
    timeline = np.array(live.timeline, np.int64)
    return Trace(len(batch.labels), timeline, forward_macs, live.macs - forward_macs, norm_macs)


def trace_evaluation(recipe: StageRecipe, device: str) -> Trace:
    """The same of an evaluation batch: forward alone."""
    objective, model = meta_model(recipe)
    images = recipe.evaluation.batch
    batch = example_batch(recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_slots": 1})}))
    repeated = {name: getattr(batch, name)[:1].expand(images, *getattr(batch, name).shape[1:]) for name in _PER_IMAGE}
    batch = replace(batch, **repeated, ids=torch.arange(images))
    batch = replace(batch, images=torch.empty_like(batch.images, device="meta"), labels=batch.labels.to("meta"))
    live = _Live(model)
    with _Device(device, recipe.engine.precision), live, torch.no_grad():
        if objective.metric == "loss":  # its evaluation looks at which images are valid, and nothing here has a value
            objective.loss(model.eval(), batch, 0)
        else:
            objective.evaluate(model.eval(), batch)
    return Trace(images, np.array(live.timeline, np.int64), live.macs, 0, live.norm_macs)


_PER_IMAGE = ("images", "labels", "valid")


class StepTraces:
    """Traces of any number of slots at once, from two: every allocation is of a constant plus a part for each image.

    On a CPU some operators work in pieces of the cache's size, so the allocations are others for each batch: there each
    size is traced for itself.
    """

    def __init__(self, recipe: StageRecipe, device: str):
        self._recipe, self._device = recipe, device
        self._known: dict[int, Trace] = {}

    def __call__(self, micro_slots: int) -> Trace:
        if micro_slots in self._known:
            return self._known[micro_slots]
        one, two = (self._traced(k) for k in (1, 2))
        if micro_slots > 2 and one.timeline.shape == two.timeline.shape:
            more = micro_slots - 1

            def grown(first: Any, second: Any) -> Any:
                return first + more * (second - first)

            return Trace(**{name: grown(getattr(one, name), getattr(two, name)) for name in Trace.__dataclass_fields__})
        return self._traced(micro_slots)

    def _traced(self, micro_slots: int) -> Trace:
        if micro_slots not in self._known:
            batch = self._recipe.batch.model_copy(update={"micro_slots": micro_slots})
            self._known[micro_slots] = trace_step(self._recipe.model_copy(update={"batch": batch}), self._device)
        return self._known[micro_slots]


class _Live(TorchDispatchMode):
    """Follows every storage that an operator makes until it is gone, and counts the operator's multiply-adds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.timeline: list[tuple[int, int]] = [(0, 0)]
        self.macs = self.norm_macs = 0
        self._bytes = [0, 0]
        self._kind: dict[int, int] = {}  # of each storage: 0 activation, 1 gradient
        self._watched: dict[int, weakref.ref] = {}
        # Views of weights are no new memory.
        own = [*model.parameters(), *model.buffers()]
        self._kind |= {tensor.untyped_storage()._cdata: 2 for tensor in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in _MACS:
            self.macs += _MACS[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten.native_layer_norm:
            self.norm_macs += NORM_MACS_PER_ELEMENT * out[0].numel()
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._kind:
            self._kind[key] = 0
            self._bytes[0] += storage.nbytes()
            self._watched[key] = weakref.ref(storage, partial(self._gone, key, storage.nbytes()))
            self.timeline.append((self._bytes[0], self._bytes[1]))

    def _gone(self, key: int, size: int, _: weakref.ref) -> None:
        del self._watched[key]
        self._bytes[self._kind.pop(key)] -= size

    def is_gradient(self, parameter: Tensor) -> None:
        storage = parameter.grad.untyped_storage()
        if self._kind.get(storage._cdata) == 0:
            self._kind[storage._cdata] = 1
            self._bytes[0] -= storage.nbytes()
            self._bytes[1] += storage.nbytes()


class _Device(TorchFunctionMode):
    """Lets meta tensors take a device's ways: its autocast, and on a GPU what is done whole instead of in parts."""

    def __init__(self, device: str, precision: str):
        super().__init__()
        self._device, self._low = device, precision.startswith("bf16")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:  # a new object at each access: never identical
            return self._device == "cuda"
        if self._low:
            if function in _LOW_PRECISION or function is torch.ops.fcmae.depthwise.default:
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
    """torch counts a multiply-add as two, and reads shapes."""
    return lambda *args, **kwargs: flops(*args, **kwargs) // 2


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    # torch's own count multiplies a depthwise weight's gradient by the number of channels.
    transposed, mask = rest[4], rest[7]
    sites = (x if transposed else gradient).shape
    return sum(mask[:2]) * weight.numel() * sites[0] * sites[2:].numel()


def _depthwise(x: Tensor, weight: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Every tap of a token is computed, those in hidden cells on zeros."""
    return x.shape[0] * weight.numel()


_ATEN, _OWN = torch.ops.aten, torch.ops.fcmae
_MACS: dict[Any, Callable[..., int]] = {
    **{operator: _halves(flops) for operator, flops in flop_registry.items()},
    _ATEN.convolution_backward: _convolution_backward,
    _OWN.depthwise: _depthwise,
    _OWN.depthwise_backward: lambda gradient, x, weight, *_, out_val, **__: 2 * x.shape[0] * weight.numel(),
}
