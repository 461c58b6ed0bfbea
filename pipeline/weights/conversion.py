"""Convert weights between the layouts of other programs and the internal layout: names, shapes and order of elements.

`tensor_names` lists the layouts. Their shapes differ from the internal ones so:

- official sparse: MinkowskiEngine's `kernel` (sites, in, out) counts sites down the columns,
  W[o, i, h, w] = kernel[h + size * w, i, o]; biases are (1, C).
- timm: GRN is (4C,), and the linear layers of atto to nano are 1x1 convolutions.
- mmsegmentation and mmdetection: the same shapes; mmpretrain's linear layers may be 1x1 convolutions.
- transformers: the same shapes; `layer_norm_eps` of its config must be 1e-6.

GRN's tensors occur as (4C,), (1, 4C) and (1, 1, 1, 4C). The official conversion, applied twice, makes them
six-dimensional and then loses them without an error; here every tensor is converted or refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import COUNTER, Architecture, ConvNeXtArchitecture, HeadedArchitecture
from pipeline.weights.inference import (
    has_detection_head,
    has_segmentation_head,
    infer_architecture,
    is_nextvit,
)
from pipeline.weights.tensor_names import (
    LAYOUTS,
    belongs_to_pretraining,
    external_name,
    internal_name,
    nextvit_internal_names,
    nextvit_timm_name,
    openmmlab_internal_names,
)

_CONV_MLP = tuple(
    f"{family}_{size}" for family in ("convnextv2", "convnext") for size in ("atto", "femto", "pico", "nano")
)


@dataclass(frozen=True)
class ConversionReport:
    """What happened to every tensor of a file.

    Attributes:
        names: internal name of each tensor, by its name in the file.
        reshaped: internal names of tensors whose shape or order of elements changed.
        dropped: tensors that were left out on purpose.
        missing: internal names of tensors that a classifier has and the file has not.
        entry: the key of the file's tensors, None if the file holds only them.
        ignored: the other keys of the file.
    """

    layout: str
    architecture: Architecture
    names: Mapping[str, str]
    reshaped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    entry: str | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A summary of one line, and a line for each list of tensors."""
        renamed = sum(internal != name for name, internal in self.names.items())
        where = f" under {self.entry!r}" if self.entry else ""
        lines = [
            f"{self.layout} layout{where}, {self.architecture}: {len(self.names)} tensors read, {renamed} renamed, "
            f"{len(self.reshaped)} reshaped, {len(self.dropped)} dropped, {len(self.missing)} missing"
        ]
        for word, names in (("dropped", self.dropped), ("missing", self.missing), ("ignored", self.ignored)):
            if names:
                lines.append(f"  {word}: {', '.join(names)}")
        return "\n".join(lines)


def to_internal(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Convert tensors of any layout to internal names, shapes and order; values and dtypes stay.

    Converting twice changes nothing.

    Raises:
        CheckpointError: with the tensor's name, its shape and the nearest layout, if a tensor is missing or unexpected
            or has another shape.
    """
    counters = tuple(name for name in tensors if name.endswith(COUNTER))
    tensors, unused = {name: tensor for name, tensor in tensors.items() if name not in counters}, ()
    if has_detection_head(tensors) or has_segmentation_head(tensors):
        layout = "mmdetection" if has_detection_head(tensors) else "mmsegmentation"
        names = openmmlab_internal_names(tensors)
        unused = tuple(tensors.keys() - names.keys())
    elif is_nextvit(tensors):
        layout, names = nextvit_internal_names(tensors)
    else:
        layout = _recognise(tensors)
        names = {name: internal_name(name, layout) for name in tensors}
    if layout != "official dense" and all(internal.startswith("encoder.") for internal in names.values()):
        names = {name: internal.removeprefix("encoder.") for name, internal in names.items()}
    if outside := _outside_encoder(names):
        raise CheckpointError(
            f"{outside} {tuple(tensors[outside].shape)} stands beside names below `encoder.`, so two models are mixed; "
            f"the nearest layout is {layout}, so hand over a file of that alone"
        )
    converted: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, internal in names.items():
        if internal in converted:
            raise CheckpointError(
                f"{name} and {sources[internal]} are both {internal} in the {layout} layout; keep one of the two"
            )
        converted[internal], sources[internal] = _to_internal_shape(name, internal, tensors[name], layout), name
    architecture = infer_architecture({name: tuple(tensor.shape) for name, tensor in converted.items()}, layout)
    _require_shapes(converted, sources, architecture, layout)
    report = ConversionReport(
        layout,
        architecture,
        names,
        tuple(name for name in converted if converted[name] is not tensors[sources[name]]),
        (*counters, *sorted(unused)),
        missing=tuple(_absent(architecture)),
    )
    return {name: converted[name] for name in architecture.shapes()}, report


def _recognise(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        raise CheckpointError("there are no tensors in it; hand over weights of a ConvNeXt")
    fits = {layout: [name for name in tensors if internal_name(name, layout)] for layout in LAYOUTS}
    layout = max(LAYOUTS, key=lambda layout: len(fits[layout]))  # the first of equals, so internal names stay
    unknown = sorted(tensors.keys() - set(fits[layout]))
    if unknown:
        name, count = unknown[0], len(fits[layout])
        nearest = f"the nearest, {layout}, has {count} of its {len(tensors)} names" if count else "no name of it fits"
        raise CheckpointError(
            f"{name} {tuple(tensors[name].shape)} belongs to no known layout of ConvNeXt V2 ({nearest}); "
            "hand over weights of that family, or take this tensor out"
        )
    return layout


def _outside_encoder(names: Mapping[str, str]) -> str | None:
    """The first name of an encoder's tensor that is not below `encoder.` although other names are."""
    bare = [
        name
        for name, internal in names.items()
        if not internal.startswith("encoder.") and not belongs_to_pretraining(internal)
    ]
    return bare[0] if bare and len(bare) < len(names) else None


def _to_internal_shape(name: str, internal: str, tensor: Tensor, layout: str) -> Tensor:
    """Convert a tensor to its internal shape; returns the same object if nothing changes."""
    shape = tuple(tensor.shape)
    if name.endswith(".kernel"):
        size = round(shape[0] ** 0.5) if tensor.ndim in (2, 3) else 0
        if size * size != (shape or (-1,))[0]:
            raise CheckpointError(
                f"{name} is {shape} but a kernel of the official sparse layout is (sites, in, out) or (sites, C) with "
                "a square number of sites; fetch the file again"
            )
        columns = tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
        return columns.permute(2, 1, 0).reshape(*columns.shape[:0:-1], size, size).transpose(2, 3).contiguous()
    if ".grn." in internal and tensor.ndim in (1, 2) and tensor.numel() == shape[-1]:
        return tensor.reshape(1, 1, 1, -1)
    if layout == "official sparse" and internal.endswith(".bias") and tensor.ndim == 2 and shape[0] == 1:
        return tensor.reshape(-1)
    if (
        layout in ("timm", "mmsegmentation", "mmdetection")
        and ".pwconv" in internal
        and tensor.ndim == 4
        and shape[2:] == (1, 1)
    ):
        return tensor.flatten(1)
    return tensor


def _require_shapes(
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, str],
    architecture: Architecture,
    layout: str,
) -> None:
    """Raise CheckpointError unless names and shapes are exactly those of the architecture."""
    expected = architecture.shapes()
    for name in [*expected, *sorted(tensors.keys() - expected.keys())]:
        actual = tuple(tensors[name].shape) if name in tensors else "absent"
        shape = expected.get(name, "absent")
        if actual != shape:
            label = name if sources.get(name, name) == name else f"{sources[name]} (internal name {name})"
            raise CheckpointError(
                f"{label} is {actual} in the file but {shape} in {architecture} ({layout} layout, the nearest one); "
                "fetch the file again or convert it anew from its source"
            )


def _absent(architecture: Architecture) -> list[str]:
    """Internal names of the tensors that a classifier of this architecture would have in addition."""
    if architecture.decoder or isinstance(architecture, HeadedArchitecture):
        return []
    classifier = replace(architecture, norm=True, classes=architecture.classes or 1)
    shapes = architecture.shapes()
    return [name for name in classifier.shapes() if name not in shapes]


def from_internal(
    tensors: Mapping[str, Tensor], architecture: Architecture, layout: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert internal tensors to the layout "official", "timm" or "transformers"; returns also the names left out.

    Only "official" has a place for FCMAE's tensors outside the encoder.

    Raises:
        CheckpointError: if timm cannot build the architecture, or the other program does not have the family.
    """
    if not isinstance(architecture, ConvNeXtArchitecture):
        return _family_from_internal(tensors, architecture, layout), ()
    if layout == "official":
        return dict(tensors), ()
    if layout == "timm" and (len(architecture.dims), architecture.stem_stride) != (4, 4):
        raise CheckpointError(
            f"timm builds ConvNeXts of 4 stages behind a stem of stride 4, and {architecture} has "
            f"{len(architecture.dims)} behind one of stride {architecture.stem_stride}; convert it to official or "
            "transformers"
        )
    dropped = tuple(name for name in tensors if belongs_to_pretraining(name))
    converted = {}
    for name, tensor in tensors.items():
        if name not in dropped:
            external = external_name(name, layout, architecture.v1)
            converted[external] = _to_timm_shape(name, tensor, architecture) if layout == "timm" else tensor
    return converted, dropped


def _to_timm_shape(name: str, tensor: Tensor, architecture: ConvNeXtArchitecture) -> Tensor:
    if ".grn." in name:
        return tensor.flatten()
    if architecture.variant in _CONV_MLP and ".pwconv" in name and tensor.ndim == 2:
        return tensor[..., None, None]
    return tensor


def _family_from_internal(tensors: Mapping[str, Tensor], architecture: Architecture, layout: str) -> dict[str, Tensor]:
    if layout != "official" and isinstance(architecture, HeadedArchitecture):
        raise CheckpointError(f"{layout} has no such {architecture.title}; convert it to official, OpenMMLab's names")
    if layout != "official" and not (architecture.family == "nextvit" and layout == "timm"):
        raise CheckpointError(f"{layout} has no {architecture.family}; convert it to official")
    if layout == "timm" and architecture.variant is None:
        raise CheckpointError(
            f"timm builds the published sizes of Next-ViT alone, and this is {architecture}; convert it to official"
        )
    names = architecture.shapes(counters=True)
    complete = {name: tensors[name] if name in tensors else torch.zeros((), dtype=torch.int64) for name in names}
    if layout == "official":
        return complete
    return {nextvit_timm_name(name, architecture.depths): tensor for name, tensor in complete.items()}
