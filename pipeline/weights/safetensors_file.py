"""Write and read the weights that a stage hands on: one safetensors file whose bytes depend on its content alone."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from pipeline.errors import CheckpointError
from pipeline.storage.folder import Folder

FACTS = "fcmae"  # one key only: safetensors writes several in random order
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones


def write_weights(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """Write full tensors (any device; floating ones become fp32) under their official names; returns the file's sha256.

    `facts` is JSON about the meaning of the weights (variant, objective, step), with no times or paths: equal content
    gives equal bytes. The file appears whole or not at all.
    """
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return write_bytes(path, safetensors_bytes(whole, {FACTS: canonical(facts)}))


def canonical(facts: Mapping[str, Any]) -> str:
    """JSON in which equal facts are equal text."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, in the dtypes given. With more than one key of metadata it is not unique."""
    return safetensors.torch.save({name: _plain(tensor) for name, tensor in tensors.items()}, dict(metadata))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def write_bytes(path: str | os.PathLike, data: bytes) -> str:
    """Write a file that appears whole or not at all; returns its sha256."""
    folder, name = _place(path)
    folder.publish(name, data)
    return hashlib.sha256(data).hexdigest()


def read_weights(path: str | os.PathLike, expected_sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, on the CPU. Raises CheckpointError when it is missing, damaged or another one."""
    data = read_bytes(path, expected_sha256)
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _not_weights(path, error) from error


def read_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The facts that `write_weights` was given; reads the header alone, so a damaged tensor goes unseen."""
    folder, name = _place(path)
    try:
        with folder.fs.open((folder / name).path, "rb") as stream:
            size = min(int.from_bytes(stream.read(8), "little"), _HEADER_LIMIT_BYTES)
            header = json.loads(stream.read(size))
        return json.loads(header["__metadata__"][FACTS])
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _not_weights(path, error) from error


def _place(path: str | os.PathLike) -> tuple[Folder, str]:
    file = Folder.at(path)
    parent, _, name = file.path.rpartition("/")
    return Folder(file.fs, parent or "/"), name


def read_bytes(path: str | os.PathLike, expected_sha256: str | None = None) -> bytes:
    """A whole file. Raises CheckpointError when it cannot be read or its sha256 is another."""
    folder, name = _place(path)
    try:
        data = folder.read(name)
    except OSError as error:
        raise _unreadable(path, error) from error
    found = hashlib.sha256(data).hexdigest()
    if expected_sha256 not in (None, found):
        raise CheckpointError(
            f"{path}: sha256 is {found} instead of {expected_sha256}; it is damaged or of another run, "
            "so fetch it again or run the stage that writes it"
        )
    return data


def _unreadable(path: str | os.PathLike, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: the weights cannot be read ({type(error).__name__}); "
        "run the stage that writes them, or correct the path"
    )


def _not_weights(path: str | os.PathLike, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut short or no safetensors file of ours ({type(error).__name__}: {error}); "
        "fetch it again or run the stage that writes it"
    )
