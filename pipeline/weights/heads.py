"""A classifier's head for other classes: rows move by the classes' names."""

import json
import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights.safetensors_file import read_bytes

_HEADS = (("head.weight", "head.bias"), ("proj_head.0.weight", "proj_head.0.bias"))


def head_names(names: Container[str]) -> tuple[str, str]:
    """The head's weight and bias among the names: Next-ViT's, or else what all others have."""
    return _HEADS[1] if _HEADS[1][0] in names else _HEADS[0]


@dataclass(frozen=True)
class HeadMatch:
    """Classes of the new head by name: with a row of the old one, and with none; and old classes nobody asked for."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        text = f"head: {len(self.matched)} of {len(self.matched) + len(self.unmatched)} classes found by name"
        if self.unmatched:
            text += f"; rows of zeros for {', '.join(self.unmatched[:8])}{', ...' if len(self.unmatched) > 8 else ''}"
        return f"{text}; {len(self.unused)} classes of the old head left out"


def map_head(
    tensors: Mapping[str, Tensor],
    old: Sequence[str],
    new: Sequence[str],
    fresh: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], HeadMatch]:
    """Weights with a head for the `new` classes: the row of the `old` class of the same name, or without one that of
    `fresh`, a head for the new classes, or zeros, an even guess.

    Order is free and either side may have more, so this leads from 22K to 1K.

    Raises:
        CheckpointError: without a head, if `old` is not as long as the head, if a name is there twice, or if no name
            is in both lists.
    """
    head = head_names(tensors)
    if missing := [name for name in head if name not in tensors]:
        raise CheckpointError(f"{missing[0]} is absent, so there is no head to map; use weights of a classifier")
    rows = len(tensors[head[0]])
    if len(old) != rows:
        raise CheckpointError(
            f"{head[0]} has {rows} rows but {len(old)} class names were given for it; give the names of the data "
            "that it was trained on, in its order"
        )
    for names in (old, new):
        name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
        if count != 1:
            found = f"class {name!r} is listed {count} times" if count else "a list of class names is empty"
            raise CheckpointError(f"{found}; give each class one name of its own")
    row_of = {name: row for row, name in enumerate(old)}
    matched = [name for name in new if name in row_of]
    if not matched:
        raise CheckpointError(
            f"no class name is in both lists ({old[0]!r}, ... and {new[0]!r}, ...); give lists of the same kind of "
            "names, or drop the head"
        )
    there = torch.tensor([row for row, name in enumerate(new) if name in row_of])
    here = torch.tensor([row_of[name] for name in matched])
    result = dict(tensors)
    for name in head:
        tensor = tensors[name]
        rows = tensor.new_zeros(len(new), *tensor.shape[1:]) if fresh is None else fresh[name].cpu()
        result[name] = rows.index_copy(0, there, tensor[here].to(rows.dtype))
    return result, HeadMatch(
        tuple(matched),
        tuple(name for name in new if name not in row_of),
        tuple(sorted(set(old) - set(new))),
    )


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Class names in the order of their labels: a text file with one on each line, a JSON list, or the side-car of a
    .beton file.

    Raises:
        CheckpointError: if the file cannot be read or holds no such list.
    """
    try:
        text = read_bytes(path).decode()
        if os.fspath(path).endswith(".json"):
            content = json.loads(text)
            names = content["classes"] if isinstance(content, dict) else content
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
        if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    except (ValueError, KeyError):
        pass
    raise CheckpointError(
        f"{path} holds no class names; write one on each line, or name a JSON list or the side-car of a .beton file"
    )
