"""Rename and reshape weights from any layout to another."""

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
from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.storage.folder import check_writable
from pipeline.weights.architecture import Architecture, HeadedArchitecture
from pipeline.weights.conversion import ConversionReport, from_internal
from pipeline.weights.foreign import load_weights
from pipeline.weights.heads import HeadMatch, head_names, map_head, read_class_names
from pipeline.weights.inference import infer_architecture
from pipeline.weights.input_channels import Adaptation, adapt_channels
from pipeline.weights.safetensors_file import FACTS, canonical, read_facts, safetensors_bytes, write_bytes

Head = Literal["keep", "drop", "map"]
Target = Literal["official", "timm", "transformers"]
PUBLISHED_GRN = {"grn_aggregation": "l2", "grn_normaliser": "mean", "grn_residual": True}
PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Conversion:
    """The report about reading, the match of the head's classes, the names of the written tensors, and the sha256."""

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
    channels: Adaptation | None = None,
    entry: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read weights of any layout and write them in layout `to`, with the same values and dtypes.

    Equal content gives an equal file. Weights that are in that layout already come out unchanged.

    Args:
        destination: ends in .safetensors, or in .pt, .pth or .bin for a pickle of tensors (in the official layout
            under the key `model`, which the official code reads).
        head: "keep", "drop" or "map". Drop removes a head or FCMAE's decoder; the encoder then has the
            names of the released ones. Map moves the head's rows to other classes by name.
        classes: for "map", the files of class names of the source and of the destination.
        channels: "sum" or "repeat" change the number of input channels, see `adapt_channels`.
        entry: see `load_weights`.

    Raises:
        CheckpointError: if a tensor of the source has no place, or the destination cannot be written.
    """
    check_destination(destination, (".safetensors", *PICKLES), overwrite)
    loaded = load_weights(source, entry)
    refuse_unpublished_options(source, loaded.report.architecture.unrecorded_options)
    tensors = adapt_channels(loaded.tensors, channels) if channels else loaded.tensors
    tensors, dropped, match = change_head(tensors, head, classes)
    architecture = architecture_of(tensors)
    tensors, unsupported = from_internal(tensors, architecture, to)
    report = replace(loaded.report, dropped=(*loaded.report.dropped, *dropped, *unsupported))
    if destination.suffix == ".safetensors":
        if to == "transformers":
            metadata = {"format": "pt"}  # transformers requires this key, and a second one would make the bytes vary
        else:
            names = read_class_names(classes[1]) if classes else None
            metadata = {FACTS: canonical(output_facts(source, architecture, to, names))}
        data = safetensors_bytes(tensors, metadata)
    else:
        data = _pickle({"model": tensors} if to == "official" else tensors)
    return Conversion(report, match, tuple(tensors), write_bytes(destination, data))


def check_destination(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raise UserError if it has another suffix, is a directory, exists without `overwrite`, or cannot be written."""
    if path.suffix not in suffixes:
        raise CheckpointError(f"{path} ends in none of {', '.join(suffixes)}; name a file with one of these suffixes")
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path} exists already; name another file, or add --overwrite to replace a file")
    check_writable(path)


def change_head(
    tensors: Mapping[str, Tensor], head: Head, classes: tuple[Path, Path] | None
) -> tuple[Mapping[str, Tensor], tuple[str, ...], HeadMatch | None]:
    """Keep, drop or map the head of internal tensors.

    Returns:
        The tensors, the names that were dropped, and for "map" the match of the classes.

    Raises:
        CheckpointError: if class names are missing or superfluous, or do not fit the head.
    """
    if (head == "map") != (classes is not None):
        raise CheckpointError(
            f"head is {head} {'with' if classes else 'without'} files of class names; give --classes OLD NEW with"
            " --head map, and only then"
        )
    if classes is not None:
        mapped, match = map_head(tensors, *map(read_class_names, classes))
        return mapped, (), match
    if head == "keep":
        return tensors, (), None
    architecture = architecture_of(tensors)
    if isinstance(architecture, HeadedArchitecture):
        encoder = {f"backbone.{name}": name for name in architecture.backbone.shapes()}
        kept = {name: encoder[name] for name in tensors if name in encoder}
    elif architecture.decoder:
        kept = {name: name.removeprefix("encoder.") for name in tensors if name.startswith("encoder.")}
    else:
        kept = {name: name for name in tensors if name not in head_names(tensors)}
    dropped = tuple(name for name in tensors if name not in kept)
    return {new: tensors[name] for name, new in kept.items()}, dropped, None


def architecture_of(tensors: Mapping[str, Tensor]) -> Architecture:
    """Infer the architecture from internal tensors."""
    return infer_architecture({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "our")


def refuse_unpublished_options(source: str | os.PathLike, unrecorded: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse weights that other programs would load without an error and compute differently.

    Args:
        unrecorded: published values of the options that tensors do not show, in addition to those of GRN.

    Raises:
        CheckpointError: if the weights were trained with another value of such an option.
    """
    published = {**PUBLISHED_GRN, **unrecorded}
    model = known_facts(source).get("model")
    for name, value in published.items() if isinstance(model, dict) else ():
        if model.get(name, value) != value:
            raise CheckpointError(
                f"{source} was trained with model.{name} {model[name]}, which no other code computes (theirs is"
                f" {value}); keep the file, or export it as safetensors, which records the option"
            )


def output_facts(
    source: str | os.PathLike, architecture: Architecture, layout: str, classes: list[str] | None = None
) -> dict[str, Any]:
    """The facts to write: those of the source, if it has any, with the new architecture and layout.

    classes: the class names of a mapped head. Without a head, the class names are removed.
    """
    known = known_facts(source)
    if classes is not None:
        known["classes"] = classes
    elif not architecture.classes:
        known.pop("classes", None)
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(architecture).items()}
    return {**facts_for_channels(known, architecture.in_channels), "layout": layout, "architecture": shape}


def facts_for_channels(facts: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return facts of weights, changed to another number of input channels if they name one."""
    changed, model = dict(facts), facts.get("model")
    if isinstance(model, dict) and model.get("in_channels", 3) != channels:
        changed["model"] = {**model, "in_channels": channels}
        changed |= ChannelStatistics.of_weights(facts, channels).facts
    return changed


def known_facts(source: str | os.PathLike) -> dict[str, Any]:
    """The facts in a file that this program wrote; {} for other files."""
    try:
        known = read_facts(source)
    except CheckpointError:
        return {}
    return known if isinstance(known, dict) else {}


def _pickle(content: dict[str, Any]) -> bytes:
    def owned(value: Any) -> Any:  # clone, because torch.save would write the whole storage behind a view
        return value.clone().contiguous() if isinstance(value, Tensor) else {k: owned(v) for k, v in value.items()}

    stream = io.BytesIO()
    torch.save(owned(content), stream)
    return stream.getvalue()
