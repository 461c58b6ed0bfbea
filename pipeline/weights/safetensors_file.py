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
from pipeline.storage.bounded_files import parse_json
from pipeline.storage.folder import Folder, storage_failure

FACTS = "fcmae"  # the only metadata key, because safetensors writes several in random order
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones


def write_weights(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """Write full tensors under their official names; returns the file's sha256.

    The file appears whole or not at all, and equal content gives equal bytes.

    Args:
        tensors: on any device; floating-point tensors are written as fp32.
        facts: JSON about the weights (variant, objective, step), without times or paths.
    """
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return write_bytes(path, safetensors_bytes(whole, {FACTS: canonical(facts)}))


def canonical(facts: Mapping[str, Any]) -> str:
    """Write facts as JSON text that is equal for equal facts."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Build the content of a safetensors file, in the given dtypes. Its bytes vary if metadata has several keys."""
    return safetensors.torch.save({name: _cpu_copy(tensor) for name, tensor in tensors.items()}, dict(metadata))


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def write_bytes(path: str | os.PathLike, data: bytes) -> str:
    """Write a file that appears whole or not at all; returns its sha256."""
    folder, name = _folder_and_name(path)
    folder.publish(name, data)
    return hashlib.sha256(data).hexdigest()


def read_weights(path: str | os.PathLike, expected_sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a weights file to the CPU.

    Raises:
        CheckpointError: if the file is missing or damaged, or its sha256 is another.
    """
    data = read_bytes(path, expected_sha256)
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _not_weights(path, error) from error


def read_facts(path: str | os.PathLike) -> dict[str, Any]:
    """Read the facts of a file of `write_weights`. Reads only the header, so damaged tensors are not detected.

    Raises:
        CheckpointError: if the file cannot be read or holds no facts.
    """
    folder, name = _folder_and_name(path)
    try:
        with folder.fs.open((folder / name).path, "rb") as stream:
            size = min(int.from_bytes(stream.read(8), "little"), _HEADER_LIMIT_BYTES)
            header = parse_json(stream.read(size))
        facts = parse_json(header["__metadata__"][FACTS])
        if not isinstance(facts, dict):
            raise ValueError("its facts are no JSON object")
        return facts
    except OSError as error:
        raise _not_readable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _not_weights(path, error) from error


def _folder_and_name(path: str | os.PathLike) -> tuple[Folder, str]:
    file = Folder.at(path)
    parent, _, name = file.path.rpartition("/")
    return Folder(file.fs, parent or "/"), name


def read_bytes(path: str | os.PathLike, expected_sha256: str | None = None) -> bytes:
    """Read a whole file.

    Raises:
        CheckpointError: if the file cannot be read or its sha256 is another.
    """
    folder, name = _folder_and_name(path)
    try:
        data = folder.read(name)
    except OSError as error:
        raise _not_readable(path, error) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if expected_sha256 not in (None, sha256):
        raise CheckpointError(
            f"{path}: sha256 is {sha256} instead of {expected_sha256}; it is damaged or of another run, "
            "so fetch it again or run the stage that writes it"
        )
    return data


def _not_readable(path: str | os.PathLike, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} does not exist; correct the path, or first run the stage that writes it")
    sentence = f"{path}: the weights cannot be read ({type(error).__name__}); "
    return storage_failure(sentence + "run the stage that writes them, or correct the path", error)


def _not_weights(path: str | os.PathLike, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is cut short, or no safetensors file with facts ({type(error).__name__}: {error}); "
        "fetch it again or run the stage that writes it"
    )
