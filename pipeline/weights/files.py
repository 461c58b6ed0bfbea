"""The hand-off between stages: one safetensors file whose bytes depend on its content alone, and a transfer in which
every tensor is accounted for.

The released code converts names in a way that, applied twice, loses every GRN tensor without an error. Here a
conversion that has been done already changes nothing, and a tensor that is neither loaded, nor initialised, nor
dropped by name is an error.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from pipeline.errors import CheckpointError
from pipeline.storage.folder import Folder

FACTS = "fcmae"  # one key only: safetensors writes several in random order
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones
_FCMAE_PARTS = {"encoder", "mask_token", "proj", "decoder", "pred"}
_CLASSIFIER_PARTS = {"downsample_layers", "stages", "norm", "head"}
_ENCODER_PARTS = (["downsample_layers"], ["stages"])
Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


def write_weights(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """Write full tensors (any device; floating ones become fp32) under their official names; returns the file's sha256.

    `facts` is JSON about the meaning of the weights (variant, objective, step), with no times or paths: equal content
    gives equal bytes. The file appears whole or not at all.
    """
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return publish(path, safetensors_bytes(whole, {FACTS: canonical(facts)}))


def canonical(facts: Mapping[str, Any]) -> str:
    """JSON in which equal facts are equal text."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file, in the dtypes given. With more than one key of metadata it is not unique."""
    return safetensors.torch.save({name: _plain(tensor) for name, tensor in tensors.items()}, dict(metadata))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def publish(path: str | os.PathLike, data: bytes) -> str:
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


@dataclass(frozen=True)
class Transfer:
    """What happens to every tensor: names of the target loaded or newly initialised, names of the source dropped."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]


def plan_transfer(source: Shapes, target: Shapes, *, drop: tuple[str, ...], fresh: tuple[str, ...]) -> Transfer:
    """Account for every tensor of both sides, in sorted order.

    `drop` (of the source) and `fresh` (of the target) hold full names, or prefixes that end in a dot. A fresh tensor
    is initialised even where the source has one, which is then dropped. Raises CheckpointError for anything else that
    does not match one to one in name and shape.
    """
    initialised = {name for name in target if _listed(name, fresh)}
    dropped = {name for name in source if _listed(name, drop) or name in initialised}
    offered = {name: tuple(shape) for name, shape in source.items() if name not in dropped}
    for name in sorted(offered.keys() | (target.keys() - initialised)):
        there = offered.get(name)
        here = tuple(target[name]) if name in target else None
        if there == here:
            continue
        if there is None:
            remedy = "list it as fresh to initialise it, or hand over weights that have it"
        elif here is None:
            remedy = "list it as dropped if the model is not to have it"
        else:
            remedy = "list it as fresh to initialise it anew, or use the model that the weights were trained with"
        shapes = ["absent" if shape is None else shape for shape in (there, here)]
        raise CheckpointError(f"{name} is {shapes[0]} in the weights and {shapes[1]} in the model; {remedy}")
    return Transfer(tuple(sorted(target.keys() - initialised)), tuple(sorted(initialised)), tuple(sorted(dropped)))


def _listed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == pattern or (pattern.endswith(".") and name.startswith(pattern)) for pattern in patterns)


def encoder_to_classifier(source: Mapping[str, T]) -> dict[str, T]:
    """FCMAE weights with `encoder.X` renamed to `X`, the classifier's names; tensors outside the encoder keep theirs.

    What is converted already comes back unchanged, so converting twice is harmless. Works on tensors and on shapes.
    Raises CheckpointError for names of neither layout, or of both at once.
    """
    parts = {name: name.partition(".")[0] for name in source}
    strangers = sorted(name for name, part in parts.items() if part not in _FCMAE_PARTS | _CLASSIFIER_PARTS)
    if strangers or not source:
        raise CheckpointError(
            f"{strangers[0] if strangers else 'an empty file'} belongs neither to FCMAE nor to classifier weights; "
            "hand over a file that a stage of this program has written"
        )
    if "encoder" not in parts.values():
        return dict(source)
    for name, part in parts.items():
        if part in _CLASSIFIER_PARTS or (part == "encoder" and name.split(".")[1:2] not in _ENCODER_PARTS):
            raise CheckpointError(
                f"{name} has no place in FCMAE weights, which hold encoder.downsample_layers.* and encoder.stages.*; "
                "hand over a file that a stage of this program has written"
            )
    return {name.removeprefix("encoder."): value for name, value in source.items()}
