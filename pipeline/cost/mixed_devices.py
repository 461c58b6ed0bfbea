"""Refuse operators that mix tensors of the host and of the device, as a GPU would.

Of meta tensors torch refuses some of them alone: products, convolutions and look-ups take a weight or an index of the
host without a word.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.cost.host_waits import project_line

# These are meant to copy between host and GPU. Whether the host waits for the copy is what `NoHostWaits` checks.
_COPYING = {"copy_", "_to_copy", "_foreach_copy_", "index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevicesError(RuntimeError):
    """An operator gets tensors of the host and of the device."""


class NoMixedDevices(TorchDispatchMode):
    """Raises `MixedDevicesError` at the first operator that a device of this type would refuse.

    A number (a 0-dim tensor of the host) may meet tensors of the device.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function._overloadpacket.__name__ not in _COPYING:
            tensors = [*_tensors(args), *_tensors(kwargs.values())]
            if any(tensor.device.type == self._device for tensor in tensors):
                alien = next((t for t in tensors if t.device.type != self._device and t.ndim), None)
                if alien is not None:
                    raise MixedDevicesError(
                        f"{project_line()}{function} gets tensors of the GPU and one of shape {tuple(alien.shape)} of"
                        " the host"
                    )
        return function(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
