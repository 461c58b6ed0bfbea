"""Names and shapes of weights in every layout in use, and the way between each of them and ours: of ConvNeXts, V2 and
V1, below; of SLaK and Next-ViT, whose layouts are the official one and Next-ViT's in timm, see `families`.

Ours are the names and shapes of the official fine-tuning code, and for FCMAE the same below `encoder.` beside
`mask_token`, `proj`, `decoder` and `pred`. The layouts:

- official dense: what was released, and what fine-tuning writes; an encoder alone, or with `norm` and `head`.
- fcmae: what our pre-training writes.
- official sparse: what the official pre-training writes. MinkowskiEngine's `kernel` (sites, in, out) counts sites down
  the columns, W[o, i, h, w] = kernel[h + size * w, i, o]; biases are (1, C); norms sit below `ln`, linear layers below
  `linear`.
- timm: other names; GRN is (4C,), and the linear layers of atto to nano are 1x1 convolutions.
- transformers: other names; `layer_norm_eps` of its config must be 1e-6.

GRN's tensors are met as (4C,), (1, 4C) and (1, 1, 1, 4C). The official conversion applied twice makes them
six-dimensional and then loses them without an error; here every tensor has a place, or is refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import Architecture, infer_architecture
from pipeline.weights.families import COUNTER, FamilyArchitecture, is_nextvit, nextvit_names, nextvit_timm_name

LAYOUTS = ("official dense", "fcmae", "official sparse", "timm", "transformers")
_CONV_MLP = tuple(
    f"{family}_{size}" for family in ("convnextv2", "convnext") for size in ("atto", "femto", "pico", "nano")
)

_FIELDS = {
    "{s}": r"(?P<s>0|[1-9]\d{0,2})",
    "{b}": r"(?P<b>0|[1-9]\d{0,2})",
    "{i}": r"(?P<i>[01])",
    "{p}": r"(?P<p>weight|bias)",
    "{k}": r"(?P<k>LoRA1|LoRA2|lkb_origin|small_conv)",
    "{v}": r"(?P<v>weight|bias|running_mean|running_var)",
}
_BLOCK_NAMES = (
    ("gamma", "gamma", "layer_scale_parameter"),
    ("dwconv.{p}", "conv_dw.{p}", "dwconv.{p}"),
    ("norm.{p}", "norm.{p}", "layernorm.{p}"),
    ("pwconv1.{p}", "mlp.fc1.{p}", "pwconv1.{p}"),
    ("grn.gamma", "mlp.grn.weight", "grn.weight"),
    ("grn.beta", "mlp.grn.bias", "grn.bias"),
    ("pwconv2.{p}", "mlp.fc2.{p}", "pwconv2.{p}"),
)
_COLUMNS = ("official dense", "timm", "transformers")
_NAMES = (  # the first row that fits counts
    ("downsample_layers.0.0.{p}", "stem.0.{p}", "embeddings.patch_embeddings.{p}"),
    ("downsample_layers.0.1.{p}", "stem.1.{p}", "embeddings.layernorm.{p}"),
    ("downsample_layers.{s}.{i}.{p}", "stages.{s}.downsample.{i}.{p}", "encoder.stages.{s}.downsampling_layer.{i}.{p}"),
    *(
        (
            f"stages.{{s}}.{{b}}.{ours}",
            f"stages.{{s}}.blocks.{{b}}.{timm}",
            f"encoder.stages.{{s}}.layers.{{b}}.{theirs}",
        )
        for ours, timm, theirs in _BLOCK_NAMES
    ),
    ("norm.{p}", "head.norm.{p}", "layernorm.{p}"),
    ("head.{p}", "head.fc.{p}", "classifier.{p}"),
    ("stages.{s}.{b}.large_kernel.{k}.conv.weight", None, None),
    ("stages.{s}.{b}.large_kernel.{k}.bn.{v}", None, None),
)
_HF = re.compile(r"^convnext(v2)?\.")  # what transformers puts before all names but the classifier's
_BLOCK = r"(?:(?:dwconv|norm|pwconv1|pwconv2)\.(?:weight|bias)|grn\.(?:gamma|beta)|gamma)"
_PRETRAINING = re.compile(rf"mask_token|(?:proj|pred)\.(?:weight|bias)|decoder\.(?:0|[1-9]\d{{0,2}})\.{_BLOCK}")
_SPARSE_PART = re.compile(r"\.(?:ln|linear)(?=\.(?:weight|bias)$)")


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for field, expression in _FIELDS.items():
        text = text.replace(re.escape(field), expression)
    return re.compile(text)


_RULES = {layout: [(_pattern(row[i]), row[0]) for row in _NAMES if row[i]] for i, layout in enumerate(_COLUMNS)}
_BACK = {layout: [(_pattern(row[0]), row[i]) for row in _NAMES if row[i]] for i, layout in enumerate(_COLUMNS)}


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if found := pattern.fullmatch(name):
            return template.format(**found.groupdict())
    return None


def internal_name(name: str, layout: str) -> str | None:
    """The name in our layout, or None where `layout` has no such name."""
    dense = _RULES["official dense"]
    if layout == "fcmae":
        inner = name.removeprefix("encoder.")
        return name if _PRETRAINING.fullmatch(name) or (inner != name and _rename(inner, dense)) else None
    if layout == "official sparse":
        plain = _SPARSE_PART.sub("", name)
        plain = plain.removesuffix("kernel") + "weight" if plain.endswith(".kernel") else plain
        return plain if _rename(plain, dense) else internal_name(plain, "fcmae")
    if layout == "official dense":
        name = re.sub(r"\.large_kernel\.Decom(?=[12]\.)", ".large_kernel.LoRA", name)
    if layout == "transformers":
        name = _HF.sub("", name)  # its model without the classifier has no such prefix
    return _rename(name, _RULES[layout])


@dataclass(frozen=True)
class ConversionReport:
    """Every tensor of a file: where it went, and what a whole model would have beside it."""

    layout: str
    architecture: Architecture | FamilyArchitecture
    names: Mapping[str, str]
    """The file's name of each tensor, and ours."""
    reshaped: tuple[str, ...] = ()
    """Our names of the tensors whose shape or order of elements was another."""
    dropped: tuple[str, ...] = ()
    """Our names of tensors that were left out on purpose."""
    missing: tuple[str, ...] = ()
    """Our names of what a classifier has and the file has not."""
    entry: str | None = None
    """The key under which the file has its tensors."""
    ignored: tuple[str, ...] = ()
    """The other keys of the file, which are no part of these weights."""

    def __str__(self) -> str:
        """Some lines for a person."""
        changed = sum(ours != theirs for theirs, ours in self.names.items())
        where = f" under {self.entry!r}" if self.entry else ""
        lines = [
            f"{self.layout} layout{where}, {self.architecture}: {len(self.names)} tensors read, {changed} renamed, "
            f"{len(self.reshaped)} reshaped, {len(self.dropped)} dropped, {len(self.missing)} missing"
        ]
        for word, names in (("dropped", self.dropped), ("missing", self.missing), ("not looked at", self.ignored)):
            if names:
                lines.append(f"  {word}: {', '.join(names)}")
        return "\n".join(lines)


def to_internal(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Tensors of any layout under our names, in our order, and the account of each. Values and dtypes stay.

    What is ours already comes back unchanged, so converting twice is harmless.

    Raises:
        CheckpointError: with the tensor's name, its shape and the nearest layout, if anything is not as it must be.
    """
    counters = tuple(name for name in tensors if name.endswith(COUNTER))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in counters}
    if is_nextvit(tensors):
        layout, names = nextvit_names(tensors)
    else:
        layout = _recognise(tensors)
        names = {name: internal_name(name, layout) for name in tensors}
    if layout != "official dense" and all(ours.startswith("encoder.") for ours in names.values()):
        names = {name: ours.removeprefix("encoder.") for name, ours in names.items()}
    if outside := _outside(names):
        raise CheckpointError(
            f"{outside} {tuple(tensors[outside].shape)} stands beside names below `encoder.`, so two models are mixed; "
            f"the nearest layout is {layout}, so hand over a file of that alone"
        )
    found: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, ours in names.items():
        if ours in found:
            raise CheckpointError(
                f"{name} and {sources[ours]} are both {ours} in the {layout} layout; keep one of the two"
            )
        found[ours], sources[ours] = _unfold(name, ours, tensors[name], layout), name
    architecture = infer_architecture({ours: tuple(tensor.shape) for ours, tensor in found.items()}, layout)
    _check(found, sources, architecture, layout)
    report = ConversionReport(
        layout,
        architecture,
        names,
        tuple(ours for ours in found if found[ours] is not tensors[sources[ours]]),
        counters,
        missing=tuple(_absent(architecture)),
    )
    return {name: found[name] for name in architecture.shapes()}, report


def _recognise(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        raise CheckpointError("there are no tensors in it; hand over weights of a ConvNeXt")
    fits = {layout: [name for name in tensors if internal_name(name, layout)] for layout in LAYOUTS}
    layout = max(LAYOUTS, key=lambda layout: len(fits[layout]))  # of equals the first, so what is ours stays ours
    strangers = sorted(tensors.keys() - set(fits[layout]))
    if strangers:
        name, count = strangers[0], len(fits[layout])
        nearest = f"the nearest, {layout}, has {count} of its {len(tensors)} names" if count else "no name of it fits"
        raise CheckpointError(
            f"{name} {tuple(tensors[name].shape)} belongs to no known layout of ConvNeXt V2 ({nearest}); "
            "hand over weights of that family, or take this tensor out"
        )
    return layout


def _outside(names: Mapping[str, str]) -> str | None:
    """A name of an encoder that is not below `encoder.` while others are."""
    bare = [
        name for name, ours in names.items() if not ours.startswith("encoder.") and not _PRETRAINING.fullmatch(ours)
    ]
    return bare[0] if bare and len(bare) < len(names) else None


def _unfold(name: str, ours: str, tensor: Tensor, layout: str) -> Tensor:
    """A tensor in the shape that ours has, the same object where it has it already; `_check` sees to the rest."""
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
    if ".grn." in ours and tensor.ndim in (1, 2) and tensor.numel() == shape[-1]:
        return tensor.reshape(1, 1, 1, -1)
    if layout == "official sparse" and ours.endswith(".bias") and tensor.ndim == 2 and shape[0] == 1:
        return tensor.reshape(-1)
    if layout == "timm" and ".pwconv" in ours and tensor.ndim == 4 and shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def _check(tensors: Mapping[str, Tensor], sources: Mapping[str, str], architecture: Architecture, layout: str) -> None:
    wanted = architecture.shapes()
    for name in [*wanted, *sorted(tensors.keys() - wanted.keys())]:
        here = tuple(tensors[name].shape) if name in tensors else "absent"
        there = wanted.get(name, "absent")
        if here != there:
            label = name if sources.get(name, name) == name else f"{sources[name]} (ours: {name})"
            raise CheckpointError(
                f"{label} is {here} in the file but {there} in {architecture} ({layout} layout, the nearest one); "
                "fetch the file again or convert it anew from its source"
            )


def _absent(architecture: Architecture | FamilyArchitecture) -> list[str]:
    if architecture.decoder:
        return []
    whole = replace(architecture, norm=True, classes=architecture.classes or 1)
    here = architecture.shapes()
    return [name for name in whole.shapes() if name not in here]


def from_internal(
    tensors: Mapping[str, Tensor], architecture: Architecture | FamilyArchitecture, layout: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Our tensors in the names and shapes of "official", "timm" or "transformers", and the names that have no place.

    FCMAE keeps everything in "official"; timm and transformers have no place for what follows its encoder.

    Raises:
        CheckpointError: for a shape that timm cannot build, or a family that the others do not have.
    """
    if isinstance(architecture, FamilyArchitecture):
        return _family_from_ours(tensors, architecture, layout), ()
    if layout == "official":
        return dict(tensors), ()
    if layout == "timm" and (len(architecture.dims), architecture.stem_stride) != (4, 4):
        raise CheckpointError(
            f"timm builds ConvNeXts of 4 stages behind a stem of stride 4, and {architecture} has "
            f"{len(architecture.dims)} behind one of stride {architecture.stem_stride}; convert it to official or "
            "transformers"
        )
    dropped = tuple(name for name in tensors if _PRETRAINING.fullmatch(name))
    converted = {}
    for name, tensor in tensors.items():
        if name not in dropped:
            theirs = _rename(name.removeprefix("encoder."), _BACK[layout])
            assert theirs, name
            if layout == "transformers" and not theirs.startswith("classifier."):
                theirs = ("convnext." if architecture.v1 else "convnextv2.") + theirs
            converted[theirs] = _fold(name, tensor, architecture) if layout == "timm" else tensor
    return converted, dropped


def _fold(name: str, tensor: Tensor, architecture: Architecture) -> Tensor:
    if ".grn." in name:
        return tensor.flatten()
    if architecture.variant in _CONV_MLP and ".pwconv" in name and tensor.ndim == 2:
        return tensor[..., None, None]
    return tensor


def _family_from_ours(
    tensors: Mapping[str, Tensor], architecture: FamilyArchitecture, layout: str
) -> dict[str, Tensor]:
    if layout != "official" and not (architecture.family == "nextvit" and layout == "timm"):
        raise CheckpointError(f"{layout} has no {architecture.family}; convert it to official")
    if layout == "timm" and architecture.variant is None:
        raise CheckpointError(
            f"timm builds the published sizes of Next-ViT alone, and this is {architecture}; convert it to official"
        )
    names = architecture.shapes(counters=True)
    whole = {name: tensors[name] if name in tensors else torch.zeros((), dtype=torch.int64) for name in names}
    if layout == "official":
        return whole
    return {nextvit_timm_name(name, architecture.depths): tensor for name, tensor in whole.items()}
