"""Weights from any layout to another: `fcmae convert`."""

import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import Architecture
from pipeline.weights.conversion import ConversionReport, from_internal
from pipeline.weights.foreign import load_weights
from pipeline.weights.heads import HeadMatch, head_names, map_head, read_class_names
from pipeline.weights.inference import infer_architecture
from pipeline.weights.safetensors_file import FACTS, canonical, read_facts, safetensors_bytes, write_bytes

Head = Literal["keep", "drop", "map"]
Target = Literal["official", "timm", "transformers"]
PUBLISHED_GRN = {"grn_aggregation": "l2", "grn_normaliser": "mean", "grn_residual": True}
PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Conversion:
    """What was read, what became of the head, and what was written: the layout's names and a sha256."""

    report: ConversionReport
    head: HeadMatch | None
    written: tuple[str, ...]
    sha256: str

    def __str__(self) -> str:
        head = [f"  {self.head}"] if self.head else []
        return "\n".join([str(self.report), *head, f"  {len(self.written)} tensors written, sha256 {self.sha256}"])


def convert(
    source: str | os.PathLike,
    destination: Path,
    to: Target,
    *,
    head: Head = "keep",
    classes: tuple[Path, Path] | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read weights of any layout and write them in `to`, values and dtypes as they are.

    Equal content gives an equal file, and what is in that layout already comes out unchanged.

    Args:
        destination: ends in .safetensors, or in .pt, .pth or .bin for a pickle of tensors (in the official layout
            below the key `model`, where its code looks).
        head: "keep"; "drop" what follows the encoder's features, a classifier's head or the decoder's side of FCMAE,
            whose encoder then has the names of the released ones; or "map" its rows by class names.
        classes: for "map", files of the class names of the source and of the destination.
        entry: see `load_weights`.

    Raises:
        CheckpointError: if the source is not accounted for in full, or the destination cannot be written.
    """
    check_destination(destination, (".safetensors", *PICKLES), overwrite)
    loaded = load_weights(source, entry)
    refuse_own_forms(source, loaded.report.architecture.unrecorded_options)
    tensors, dropped, match = change_head(loaded.tensors, head, classes)
    architecture = architecture_of(tensors)
    tensors, homeless = from_internal(tensors, architecture, to)
    report = replace(loaded.report, dropped=(*loaded.report.dropped, *dropped, *homeless))
    if destination.suffix == ".safetensors":
        # transformers refuses files whose metadata names no format; a second key would make the bytes vary.
        metadata = (
            {"format": "pt"}
            if to == "transformers"
            else {FACTS: canonical(facts(source, architecture, to, read_class_names(classes[1]) if classes else None))}
        )
        data = safetensors_bytes(tensors, metadata)
    else:
        data = _pickle({"model": tensors} if to == "official" else tensors)
    return Conversion(report, match, tuple(tensors), write_bytes(destination, data))


def check_destination(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raises CheckpointError for another ending, or for what exists and is not to be overwritten."""
    if path.suffix not in suffixes:
        raise CheckpointError(f"{path} ends in none of {', '.join(suffixes)}; name the file to write by its kind")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} exists already; name another file, or add --overwrite to replace a file")


def change_head(
    tensors: Mapping[str, Tensor], head: Head, classes: tuple[Path, Path] | None = None
) -> tuple[Mapping[str, Tensor], tuple[str, ...], HeadMatch | None]:
    """Our weights with the head kept, dropped or mapped by class names; the names that were dropped; the match."""
    if (head == "map") != (classes is not None):
        raise CheckpointError(
            f"head is {head} {'with' if classes else 'without'} files of class names; "
            "mapping needs those of both sides, and nothing else takes them"
        )
    if classes is not None:
        mapped, match = map_head(tensors, *map(read_class_names, classes))
        return mapped, (), match
    if head == "keep":
        return tensors, (), None
    if architecture_of(tensors).decoder:
        kept = {name: name.removeprefix("encoder.") for name in tensors if name.startswith("encoder.")}
    else:
        kept = {name: name for name in tensors if name not in head_names(tensors)}
    dropped = tuple(name for name in tensors if name not in kept)
    return {ours: tensors[name] for name, ours in kept.items()}, dropped, None


def architecture_of(tensors: Mapping[str, Tensor]) -> Architecture:
    """What our tensors say about their model."""
    return infer_architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "our")


def refuse_own_forms(source: str | os.PathLike, untold: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raises CheckpointError for weights trained with forms of their own while their tensors look like everybody's:
    other code would read them without a word and compute something else. `untold` has the published values of what
    tensors do not tell beside the form of GRN.
    """
    published = {**PUBLISHED_GRN, **untold}
    model = known_facts(source).get("model")
    for name, value in published.items() if isinstance(model, dict) else ():
        if model.get(name, value) != value:
            raise CheckpointError(
                f"{source} was trained with model.{name} {model[name]}, which no other code computes (theirs is"
                f" {value}); keep the file as it is, or export it as safetensors, which says so"
            )


def facts(
    source: str | os.PathLike,
    architecture: Architecture,
    layout: str,
    classes: list[str] | None = None,
) -> dict[str, Any]:
    """What the source says about itself, if it is a file of ours, with the shape and layout of what is written.

    classes: the names of the rows of a head that was mapped. A head that is gone takes its names along.
    """
    known = known_facts(source)
    if classes is not None:
        known["classes"] = classes
    elif not architecture.classes:
        known.pop("classes", None)
    return {**known, "layout": layout, "architecture": _plain(architecture)}


def known_facts(source: str | os.PathLike) -> dict[str, Any]:
    """What a file of ours says about itself; of others, nothing."""
    try:
        known = read_facts(source)
    except CheckpointError:
        return {}
    return known if isinstance(known, dict) else {}


def _plain(architecture: Architecture) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(architecture).items()}


def _pickle(content: dict[str, Any]) -> bytes:
    def owned(value: Any) -> Any:  # a view would drag the whole of its storage into the file
        return value.clone().contiguous() if isinstance(value, Tensor) else {k: owned(v) for k, v in value.items()}

    stream = io.BytesIO()
    torch.save(owned(content), stream)
    return stream.getvalue()
