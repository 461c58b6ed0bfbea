"""Read weights from a file of any program: this one, the official code, timm or transformers. No code in it is run."""

import argparse
import io
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import COUNTER
from pipeline.weights.conversion import ConversionReport, to_internal
from pipeline.weights.input_channels import refuse_other_channels
from pipeline.weights.safetensors_file import read_bytes

_ENTRIES = ("model", "state_dict", "model_ema", "state_dict_ema")  # keys of weights in checkpoints; the first is used
_QUICK_BYTES = 2**30  # read, with checksums, in a few seconds
_ZIP = b"PK\x03\x04"
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SUFFIXES = {
    "safetensors": (".safetensors",),
    "PyTorch pickle": (".pt", ".pth", ".bin", ".ckpt", ".tar"),
}


class MissingEntryError(CheckpointError):
    """A file that has no dictionary under the requested key."""


class LoadedWeights(NamedTuple):
    """Weights on the CPU, under internal names and in the dtypes of the file, with a report about their conversion."""

    tensors: dict[str, Tensor]
    report: ConversionReport


def load_weights(
    path: str | os.PathLike, entry: str | None = None, expected_sha256: str | None = None
) -> LoadedWeights:
    """Read a safetensors file or a PyTorch pickle of tensors (only with `weights_only`).

    Pickles of torch 1.6 and later hold checksums, so a changed byte in a tensor is detected. For safetensors files and
    older pickles, which hold none, give `expected_sha256`.

    Args:
        path: a local file or an fsspec URL.
        entry: the key of a pickled dictionary that holds the weights, such as "model_ema"; None tries the usual keys.
        expected_sha256: any other file is refused.

    Raises:
        MissingEntryError: if there is no dictionary under `entry`.
        CheckpointError: if the file is missing, damaged, mislabelled or of another family, if a tensor of it has no
            place in the model, or if its images have other than one or three channels.
    """
    return decode_weights(path, read_bytes(path, expected_sha256), entry)


def decode_weights(path: str | os.PathLike, data: bytes, entry: str | None = None) -> LoadedWeights:
    """`load_weights` from the file's content; `path` is its name for error texts."""
    return _converted(path, *_tensors(path, data, entry))


@lru_cache(maxsize=8)
def read_shapes(path: str, size_bytes: int, changed_ns: int) -> dict[str, Tensor] | None:
    """The weights of a local file on the meta device: names and shapes. Of a safetensors file only the header is read.

    Args:
        size_bytes, changed_ns: of the file, so that another one under its name is read anew.

    Returns:
        None for a pickle that takes long to read.

    Raises:
        CheckpointError: as `load_weights`.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as stream:
        kind = _kind(path, stream.read(20))
    if kind != "safetensors":
        if size_bytes > _QUICK_BYTES:
            return None
        return {name: tensor.to("meta") for name, tensor in load_weights(path).tensors.items()}
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise _damaged(path, kind, error) from error
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return _converted(path, _unwrapped(tensors)).tensors


def _converted(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], chosen: str | None = None, ignored: tuple[str, ...] = ()
) -> LoadedWeights:
    try:
        converted, report = to_internal(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    refuse_other_channels(report.architecture.in_channels, str(path))
    return LoadedWeights(converted, replace(report, entry=chosen, ignored=ignored))


def load_tensors(
    path: str | os.PathLike, entry: str | None = None, expected_sha256: str | None = None
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """Read the weights of any model; returns the tensors under the file's names, their key, and the other keys.

    Arguments and errors are those of `load_weights`.
    """
    return _tensors(path, read_bytes(path, expected_sha256), entry)


def _tensors(
    path: str | os.PathLike, data: bytes, entry: str | None
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    content = _decode(path, data)
    try:
        tensors, chosen, ignored = _choose(content, entry)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    if data[:4] != _ZIP and (name := next((name for name, tensor in tensors.items() if _has_gaps(tensor)), None)):
        # A changed size leaves the strides; without checksums nothing else shows it where no other tensor has the size.
        raise CheckpointError(
            f"{path}: {name} {tuple(tensors[name].shape)} has gaps between its elements, as in a damaged file; fetch it"
            " again, or save a contiguous copy of the tensor"
        )
    return _unwrapped(tensors), chosen, ignored


def _has_gaps(tensor: Tensor) -> bool:
    """Whether the elements of a tensor do not lie one beside the other, in any order of its axes."""
    adjacent = 1
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in axes if size > 1):
        if stride != adjacent:
            return True
        adjacent *= size
    return False


def _decode(path: str | os.PathLike, data: bytes) -> Any:
    kind = _kind(path, data)
    try:
        if kind == "safetensors":
            return safetensors.torch.load(data)
        # torch writes a checksum of each record, but does not compare it when it reads.
        if data[:4] == _ZIP:
            archive = zipfile.ZipFile(io.BytesIO(data))
            if sum(record.file_size for record in archive.infolist()) > len(data):  # torch compresses nothing
                raise ValueError("its records claim more bytes than the file holds")
            if record := archive.testzip():
                raise ValueError(f"{record} has another checksum than was written")
        # The official code saves its command line, an argparse.Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds a pickled {named[1]}, which is no tensor and could run code; save its state dict alone, "
                "on the machine that trusts it"
            ) from error
        raise _damaged(path, kind, error) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise _damaged(path, kind, error) from error


def _kind(path: str | os.PathLike, data: bytes) -> str:
    # Look for safetensors first, because some lengths of its header begin with the same byte as a pickle.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= 100_000_000:
        kind = "safetensors"
    elif data[:4] == _ZIP or data[:1] == b"\x80":
        kind = "PyTorch pickle"
    else:
        raise CheckpointError(
            f"{path} {_first_look(data)}, so it is neither safetensors nor a PyTorch pickle; fetch it again"
        )
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    label = next((label for label, suffixes in _SUFFIXES.items() if suffix in suffixes), kind)
    if label != kind:
        raise CheckpointError(
            f"{path} is a {kind} file by its content and not {label}; rename it to end in {_SUFFIXES[kind][0]}"
        )
    return kind


def _first_look(data: bytes) -> str:
    """What a file that holds no weights holds, by its first bytes."""
    if not data:
        return "is empty"
    kinds = {b"\x89PNG": "PNG image", b"\xff\xd8\xff": "JPEG image", b"GIF8": "GIF image", b"%PDF": "PDF document",
             b"\x1f\x8b": "gzip archive"}  # fmt: skip
    if kind := next((kind for start, kind in kinds.items() if data.startswith(start)), None):
        return f"is a {kind}"
    text = data[:20].decode("ascii", errors="replace")
    return f"begins with {text!r}" if text.isprintable() else "begins with bytes of no format known here"


def _damaged(path: str | os.PathLike, kind: str, error: Exception) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "documentation" not in line]
    # torch's unpickler gives its reason in the last line, after advice; other errors in the first.
    reason = (
        (lines[-1] if isinstance(error, pickle.UnpicklingError) else lines[0])[:200] if lines else "no reason given"
    )
    return CheckpointError(
        f"{path} is cut short or damaged: it cannot be read as {kind} ({type(error).__name__}: {reason}); "
        "fetch it again"
    )


def _choose(content: Any, entry: str | None) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """Find the weights in a pickled dictionary; returns the tensors, their key, and the other keys."""
    if not isinstance(content, Mapping):
        raise MissingEntryError(
            f"it holds a {type(content).__name__} and not a dictionary of tensors; save a state dict"
        )
    keys = [str(key) for key in content]
    if entry is not None and not isinstance(content.get(entry), Mapping):
        raise MissingEntryError(f"it has no dictionary under {entry!r}; its keys are {_some(keys)}")
    chosen = entry or next((key for key in _ENTRIES if isinstance(content.get(key), Mapping)), None)
    tensors = content if chosen is None else content[chosen]
    for name, value in tensors.items():
        if problem := _problem(name, value):
            tried = "" if chosen else f" (no weights under {' or '.join(_ENTRIES)}; its keys are {_some(keys)})"
            raise CheckpointError(f"{name} {problem}{tried}; save the model's state dict alone")
    plain = {name: tensor.detach() for name, tensor in tensors.items()}  # parameters become tensors
    return plain, chosen, tuple(key for key in keys if chosen is not None and key != chosen)


def _problem(name: Any, value: Any) -> str | None:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return f"is a {type(value).__name__} and not a named tensor"
    shape = tuple(value.shape)
    if name.endswith(COUNTER) and value.dtype is torch.int64 and shape == ():
        return None
    if value.numel() * value.element_size() > _bytes_of(value):
        return f"{shape} claims more elements than the file holds"
    if value.dtype not in _DTYPES or value.layout is not torch.strided or value.device.type != "cpu":
        return f"{shape} holds {value.dtype} ({value.layout}, {value.device}) and not plain floating-point numbers"
    if not value.isfinite().all():
        return f"{shape} has {int((~value.isfinite()).sum())} elements that are NaN or infinite"
    return None


def _bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor's storage. A pickle may repeat one element without end."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else sys.maxsize


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") or "none"


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while tensors and (prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
