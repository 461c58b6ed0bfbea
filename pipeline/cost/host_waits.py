"""Refuse what makes the host wait for the device: reading a value, a result of unknown size, a blocking copy."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that return values of the device to the host, or whose result has a size that the host reads there.
_READING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPYING = {"copy_", "_to_copy"}
_PROJECT = Path(__file__).parents[2]
_ROOMS = tuple(f"{_PROJECT / room}{os.sep}" for room in ("pipeline", "cluster", "tools", "tests"))
_MODES = str(Path(__file__).parent)  # modes stand on the stack below what calls the operator


class HostWaitError(RuntimeError):
    """The host would wait for the device where it must not."""


class NoHostWaits:
    """A context in which the first operator that makes the host wait for the device raises `HostWaitError`.

    With "meta" as the device no GPU is needed.

    Args:
        device: type of the device that must not be waited for.
    """

    def __init__(self, device: str = "meta"):
        self._modes = _Functions(device), _Operators(device)
        self._entered = ExitStack()

    def __enter__(self) -> "NoHostWaits":
        for mode in self._modes:
            self._entered.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


class _Functions(TorchFunctionMode):
    """Refuses functions that copy values of Python to the device: no operator shows their copy."""

    def __init__(self, device: str):
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and result.device.type == self._device:
            raise _error(f"torch.{function.__name__} copies its values to the device, which waits")
        return result


class _Operators(TorchDispatchMode):
    """Refuses operators."""

    def __init__(self, device: str):
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._overloadpacket.__name__
        if name in _READING:
            if self._is_on_device(args) and kwargs.get("output_size") is None:
                raise _error(f"{function} reads a value of the device")
        elif name in _INDEXING:
            self._check_index(function, args[0], args[1])
        elif name in _COPYING:
            self._check_copy(function, args, kwargs)
        return function(*args, **kwargs)

    def _is_on_device(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.device.type == self._device for leaf in tree_leaves(values))

    def _check_index(self, function: Any, x: Tensor, places: Any) -> None:
        if x.device.type != self._device:
            return
        for place in (place for place in places if place is not None):
            if place.dtype in (torch.bool, torch.uint8):
                raise _error(f"{function} selects by a mask, so the host reads the size of the result")
            if place.device.type != self._device:
                raise _error(f"{function} copies an index from the host to the device, which waits")

    def _check_copy(self, function: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if len(args) > 1:  # copy_(target, source, non_blocking)
            target, source, asynchronous = args[0].device.type, args[1].device.type, True in args[2:3]
        else:
            source = args[0].device.type
            target = torch.device(kwargs.get("device") or source).type
            asynchronous = bool(kwargs.get("non_blocking"))
        if source == self._device != target:
            raise _error(f"{function} copies from the device to the host")
        if target == self._device != source and not asynchronous:
            raise _error(f"{function} copies from the host to the device, which waits without non_blocking")


def _error(sentence: str) -> HostWaitError:
    return HostWaitError(f"{project_line()}{sentence}")


def project_line() -> str:
    """The innermost line of the program outside of this room, as `path:line: `; empty if there is none."""
    frame = sys._getframe(1)
    while frame and (not (path := frame.f_code.co_filename).startswith(_ROOMS) or path.startswith(_MODES)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(_PROJECT)}:{frame.f_lineno}: " if frame else ""
