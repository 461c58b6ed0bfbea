"""The names of a model's tensors in the layouts of other programs, and in the internal layout.

The internal layout has the names of the official fine-tuning code; FCMAE has them below `encoder.`, and beside that
`mask_token`, `proj`, `decoder` and `pred`. The layouts of files:

- official dense: the released weights and the output of fine-tuning; an encoder alone, or with `norm` and `head`.
- fcmae: the output of this program's pre-training.
- official sparse: the output of the official pre-training with MinkowskiEngine; norms are below `ln`, linear layers
  below `linear`, and a convolution has a `kernel`.
- timm and transformers: other names.
- mmsegmentation and mmdetection: models for segmentation and detection, whose names are also the internal ones: the
  backbone's official names below `backbone.`, or those of mmpretrain, and `neck`, `decode_head` and `auxiliary_head`,
  or `neck`, `rpn_head` and `roi_head`.

For SLaK only the official layout is in use, for Next-ViT also timm's. One early SLaK has the names Decom1 and Decom2
for LoRA1 and LoRA2.
"""

import re
from collections.abc import Collection, Iterable
from itertools import accumulate

LAYOUTS = ("official dense", "fcmae", "official sparse", "timm", "transformers")

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
_NAMES = (  # the first row that matches a name is used
    ("downsample_layers.0.0.{p}", "stem.0.{p}", "embeddings.patch_embeddings.{p}"),
    ("downsample_layers.0.1.{p}", "stem.1.{p}", "embeddings.layernorm.{p}"),
    ("downsample_layers.{s}.{i}.{p}", "stages.{s}.downsample.{i}.{p}", "encoder.stages.{s}.downsampling_layer.{i}.{p}"),
    *(
        (
            f"stages.{{s}}.{{b}}.{official}",
            f"stages.{{s}}.blocks.{{b}}.{timm}",
            f"encoder.stages.{{s}}.layers.{{b}}.{transformers}",
        )
        for official, timm, transformers in _BLOCK_NAMES
    ),
    ("norm.{p}", "head.norm.{p}", "layernorm.{p}"),
    ("head.{p}", "head.fc.{p}", "classifier.{p}"),
    ("stages.{s}.{b}.large_kernel.{k}.conv.weight", None, None),
    ("stages.{s}.{b}.large_kernel.{k}.bn.{v}", None, None),
)
_HF = re.compile(r"^convnext(v2)?\.")  # transformers' prefix of all names but the classifier's
_BLOCK = r"(?:(?:dwconv|norm|pwconv1|pwconv2)\.(?:weight|bias)|grn\.(?:gamma|beta)|gamma)"
_PRETRAINING = re.compile(rf"mask_token|(?:proj|pred)\.(?:weight|bias)|decoder\.(?:0|[1-9]\d{{0,2}})\.{_BLOCK}")
_TIMM_BLOCK = re.compile(r"stages\.(\d{1,3})\.blocks\.(\d{1,3})\.(.+)")  # of Next-ViT
_MMPRETRAIN = (("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv"))
_SPARSE_PART = re.compile(r"\.(?:ln|linear)(?=\.(?:weight|bias)$)")


def _compile(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for field, expression in _FIELDS.items():
        text = text.replace(re.escape(field), expression)
    return re.compile(text)


_TO_INTERNAL = {layout: [(_compile(row[i]), row[0]) for row in _NAMES if row[i]] for i, layout in enumerate(_COLUMNS)}
_FROM_INTERNAL = {layout: [(_compile(row[0]), row[i]) for row in _NAMES if row[i]] for i, layout in enumerate(_COLUMNS)}


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def internal_name(name: str, layout: str) -> str | None:
    """Convert a tensor's name from `layout`; None if `layout` has no such name."""
    dense = _TO_INTERNAL["official dense"]
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
        name = _HF.sub("", name)  # absent in transformers' models without classifier
    return _rename(name, _TO_INTERNAL[layout])


def external_name(name: str, layout: str, v1: bool) -> str:
    """Convert an internal name of an encoder or classifier to "timm" or "transformers"; `v1` is for ConvNeXt V1."""
    external = _rename(name.removeprefix("encoder."), _FROM_INTERNAL[layout])
    assert external, name
    if layout == "transformers" and not external.startswith("classifier."):
        return ("convnext." if v1 else "convnextv2.") + external
    return external


def belongs_to_pretraining(name: str) -> bool:
    """Whether an internal name is that of a tensor of FCMAE outside its encoder."""
    return bool(_PRETRAINING.fullmatch(name))


def nextvit_internal_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Recognise the layout, "official dense" or "timm"; returns it and the internal names. Unknown names stay."""
    blocks = {name: _TIMM_BLOCK.fullmatch(name) for name in names}
    depths: dict[int, set[int]] = {}
    for match in filter(None, blocks.values()):
        depths.setdefault(int(match[1]), set()).add(int(match[2]))
    if not depths:
        return "official dense", {name: name for name in blocks}
    first = dict(zip(sorted(depths), accumulate((len(depths[s]) for s in sorted(depths)), initial=0), strict=False))
    internal = {}
    for name, match in blocks.items():
        if match:
            rest = re.sub(r"^mlp\.fc(?=[12]\.)", "mlp.conv", match[3])
            internal[name] = f"features.{first[int(match[1])] + int(match[2])}.{rest}"
        else:
            internal[name] = re.sub(r"^head\.fc\.", "proj_head.0.", name)
    return "timm", internal


def nextvit_timm_name(name: str, depths: tuple[int, ...]) -> str:
    """Convert a Next-ViT tensor's internal name to timm's."""
    if not name.startswith("features."):
        return name.replace("proj_head.0.", "head.fc.")
    _, index, rest = name.split(".", 2)
    starts = list(accumulate(depths, initial=0))
    stage = next(s for s in range(len(depths)) if int(index) < starts[s + 1])
    return f"stages.{stage}.blocks.{int(index) - starts[stage]}.{rest.replace('mlp.conv', 'mlp.fc')}"


def openmmlab_internal_names(names: Collection[str]) -> dict[str, str]:
    """Convert the names of mmsegmentation and mmdetection to internal ones; those of tensors without use are left out.

    Next-ViT's official code makes a norm for the last map, `extra_norm_list.3`, and reads `norm` in its place.
    """
    unused = re.compile(r"backbone\.extra_norm_list\.3\.(.+)")
    internal = {}
    for name in names:
        if match := unused.fullmatch(name):
            if f"backbone.norm.{match[1]}" not in names:
                internal[name] = f"backbone.norm.{match[1]}"
            continue
        internal[name] = name
        for theirs, official in _MMPRETRAIN:
            internal[name] = re.sub(rf"(?<=\.){theirs}(?=[12]?\.)", official, internal[name])
    return internal
