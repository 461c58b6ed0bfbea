"""Map a classifier's head to other classes: rows are matched by the names of the classes."""

import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, counted
from pipeline.storage.bounded_files import parse_json
from pipeline.weights.safetensors_file import read_bytes

_HEADS = (("head.weight", "head.bias"), ("proj_head.0.weight", "proj_head.0.bias"))


def head_names(names: Container[str]) -> tuple[str, str]:
    """The names of the head's weight and bias: Next-ViT's if its weight is among `names`, else those of all others."""
    return _HEADS[1] if _HEADS[1][0] in names else _HEADS[0]


@dataclass(frozen=True)
class HeadMatch:
    """Names of the classes of a new head.

    Attributes:
        matched: classes whose row comes from the old head.
        unmatched: classes that the old head does not have.
        unused: classes of the old head that the new head does not have.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        text = f"head: {len(self.matched)} of {len(self.matched) + len(self.unmatched)} classes found by name"
        if self.unmatched:
            text += f"; rows of zeros for {', '.join(self.unmatched[:8])}{', ...' if len(self.unmatched) > 8 else ''}"
        return f"{text}; {counted(len(self.unused), 'class', 'classes')} of the old head left out"


def map_head(
    tensors: Mapping[str, Tensor],
    old: Sequence[str],
    new: Sequence[str],
    fresh: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], HeadMatch]:
    """Replace the head by one for other classes, for example to go from 22K to 1K.

    Args:
        tensors: the weights, with a head for the `old` classes.
        old: class names in the order of the old head's rows.
        new: class names in the order of the new head's rows; the order is free, and either side may have more.
        fresh: a head for the `new` classes, whose rows serve classes that are not in `old`; None for rows of zeros.

    Raises:
        CheckpointError: if there is no head, if `old` is not as long as the head, if a name is listed twice, or if no
            name is in both lists.
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
            problem = f"class {name!r} is listed {count} times" if count else "a list of class names is empty"
            raise CheckpointError(f"{problem}; give each class one name of its own")
    row_of = {name: row for row, name in enumerate(old)}
    matched = [name for name in new if name in row_of]
    if not matched:
        raise CheckpointError(
            f"no class name is in both lists ({old[0]!r}, ... and {new[0]!r}, ...); give lists of the same kind of "
            "names, or drop the head"
        )
    new_rows = torch.tensor([row for row, name in enumerate(new) if name in row_of])
    old_rows = torch.tensor([row_of[name] for name in matched])
    result = dict(tensors)
    for name in head:
        tensor = tensors[name]
        rows = tensor.new_zeros(len(new), *tensor.shape[1:]) if fresh is None else fresh[name].cpu()
        result[name] = rows.index_copy(0, new_rows, tensor[old_rows].to(rows.dtype))
    return result, HeadMatch(
        tuple(matched),
        tuple(name for name in new if name not in row_of),
        tuple(sorted(set(old) - set(new))),
    )


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Read class names in the order of their labels.

    The file is text with one name per line, a JSON list, or the side-car of a .beton file.

    Raises:
        CheckpointError: if the file cannot be read or holds no such list.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        if os.fspath(path).endswith(".json"):
            content = parse_json(text)
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
