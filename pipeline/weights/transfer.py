"""Plan how the weights of one stage fill the model of the next: account for every tensor.

The released code renames tensors in a way that, applied twice, loses every GRN tensor without an error. Here renaming
twice changes nothing, and a tensor that is neither loaded, nor initialised, nor dropped by name is an error.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import CheckpointError
from pipeline.weights.architecture import COUNTER, Shape

_FCMAE_PARTS = {"encoder", "mask_token", "proj", "decoder", "pred"}
_CLASSIFIER_PARTS = {"downsample_layers", "stages", "norm", "head"}
_ENCODER_PARTS = (["downsample_layers"], ["stages"])
_SEGMENTER_HEADS = ("decode_head.", "auxiliary_head.", "neck.")
_DETECTOR_HEADS = ("rpn_head.", "roi_head.")
_MAP_NORM = re.compile(r"backbone\.(norm\d*|extra_norm_list)\.")
_NO_BACKBONE = ("mask_token", "proj.", "decoder.", "pred.", "head.", "proj_head.")
T = TypeVar("T")


@dataclass(frozen=True)
class Transfer:
    """What happens to every tensor: names of the target loaded or newly initialised, names of the source dropped."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]


def plan_transfer(
    source: Mapping[str, Shape], target: Mapping[str, Shape], *, drop: tuple[str, ...], fresh: tuple[str, ...]
) -> Transfer:
    """Assign every tensor of both sides to one list of a `Transfer`; the lists are sorted.

    `drop` (of the source) and `fresh` (of the target) hold full names, or prefixes that end in a dot. A fresh tensor
    is initialised even if the source has one, which is then dropped.

    Raises:
        CheckpointError: if any other tensor does not match one to one in name and shape.
    """
    initialised = {name for name in target if _matches(name, fresh)}
    dropped = {name for name in source if _matches(name, drop) or name in initialised}
    offered = {name: tuple(shape) for name, shape in source.items() if name not in dropped}
    for name in sorted(offered.keys() | (target.keys() - initialised)):
        saved = offered.get(name)
        wanted = tuple(target[name]) if name in target else None
        if saved == wanted:
            continue
        if saved is None:
            remedy = "list it as fresh to initialise it, or hand over weights that have it"
        elif wanted is None:
            remedy = "list it as dropped if the model is not to have it"
        else:
            remedy = "list it as fresh to initialise it anew, or use the model that the weights were trained with"
        shapes = ["absent" if shape is None else shape for shape in (saved, wanted)]
        raise CheckpointError(f"{name} is {shapes[0]} in the weights and {shapes[1]} in the model; {remedy}")
    return Transfer(tuple(sorted(target.keys() - initialised)), tuple(sorted(initialised)), tuple(sorted(dropped)))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == pattern or (pattern.endswith(".") and name.startswith(pattern)) for pattern in patterns)


def encoder_to_classifier(source: Mapping[str, T]) -> dict[str, T]:
    """Rename FCMAE's `encoder.X` to `X`, the classifier's name; tensors outside the encoder keep their names.

    Renaming twice changes nothing. Works on tensors and on shapes.

    Raises:
        CheckpointError: for names of neither layout, or of both at once.
    """
    parts = {name: name.partition(".")[0] for name in source}
    unknown = sorted(name for name, part in parts.items() if part not in _FCMAE_PARTS | _CLASSIFIER_PARTS)
    if unknown or not source:
        raise CheckpointError(
            f"{unknown[0] if unknown else 'an empty file'} belongs neither to FCMAE nor to classifier weights; "
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


def segmenter_weights(
    source: Mapping[str, T], target: Collection[str], keep_head: bool
) -> tuple[dict[str, T], tuple[str, ...], tuple[str, ...]]:
    """Bring the weights of an encoder, a classifier, a segmenter or a detector under a segmenter's names, `backbone.X`.

    Norms of the maps and an auxiliary head may be on one side alone.

    Args:
        target: the names of the segmenter's tensors.
        keep_head: keep the head, which the weights must have; otherwise a new one is made.

    Returns:
        The weights, and `drop` and `fresh` of `plan_transfer`.

    Raises:
        CheckpointError: as `encoder_to_classifier`; or if there is no head to keep.
    """
    if keep_head and not any(name.startswith("decode_head.") for name in source):
        raise CheckpointError("init.head is keep but the weights have no head for segmentation; set it to new")
    weights, drop, fresh = _behind_prefix(source, target)
    for part in (*_SEGMENTER_HEADS, *_DETECTOR_HEADS):
        ours, theirs = (any(name.startswith(part) for name in names) for names in (target, weights))
        is_kept = keep_head and part in _SEGMENTER_HEADS
        is_required = is_kept and part != "auxiliary_head."
        if theirs and not (is_kept and (ours or is_required)):
            drop.append(part)
        if ours and not (is_kept and (theirs or is_required)):
            fresh.append(part)
    return weights, tuple(drop), tuple(fresh)


def detector_weights(
    source: Mapping[str, T], target: Mapping[str, T], keep_head: bool
) -> tuple[dict[str, T], tuple[str, ...], tuple[str, ...]]:
    """Bring the weights of an encoder, a classifier, a segmenter or a detector under a detector's names, `backbone.X`.

    Norms of the maps may be on one side alone.

    Args:
        target: the detector's tensors.
        keep_head: keep the heads, which the weights must have; of weights for other numbers of classes, without the
            layers that have a row for each class. Otherwise new ones are made.

    Returns:
        The weights, and `drop` and `fresh` of `plan_transfer`.

    Raises:
        CheckpointError: as `encoder_to_classifier`; or if there are no heads to keep, or others than the target has.
    """
    if keep_head and not any(name.startswith(("rpn_head.", "roi_head.")) for name in source):
        raise CheckpointError("init.head is keep but the weights have no heads for detection; set it to new")
    weights, drop, fresh = _behind_prefix(source, target)
    heads = (*_SEGMENTER_HEADS, *_DETECTOR_HEADS)
    shapes = [
        {name: tuple(value.shape) for name, value in side.items() if name.startswith(heads)}
        for side in (weights, target)
    ]
    kept = _kept_heads(*shapes) if keep_head else set()
    for names, side in zip((drop, fresh), shapes, strict=True):
        names += [name for name in side if name not in kept]
    return weights, tuple(drop), tuple(fresh)


def _kept_heads(source: Mapping[str, Shape], target: Mapping[str, Shape]) -> set[str]:
    """The names of the heads' tensors that the target takes over, given the shapes of all of both."""
    kept = {name for name in target if source.get(name) == target[name]}
    rest = (source.keys() | target.keys()) - kept
    by_classes = {name for name in class_layers(rest) if name in source and name in target}
    for name in sorted(rest - by_classes):
        if name.endswith(COUNTER):  # foreign weights are read without
            continue
        shapes = ["absent" if shape is None else shape for shape in (source.get(name), target.get(name))]
        settings = (
            "objective.head, masks and region_norm"
            if "absent" in shapes
            else "objective.head_channels, fc_channels and model"
        )
        raise CheckpointError(
            f"init.head is keep, but {name} is {shapes[0]} in the weights and {shapes[1]} in the model; set"
            f" {settings} as they were for the weights, or init.head to new"
        )
    return kept


def class_layers(names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of a detector with a row, or rows, for each class."""
    return tuple(name for name in names if name.rpartition(".")[0].endswith(("fc_cls", "fc_reg", "conv_logits")))


def _behind_prefix(source: Mapping[str, T], target: Collection[str]) -> tuple[dict[str, T], list[str], list[str]]:
    """The weights with a backbone's names below `backbone.`, and what of it is dropped and made new for `target`."""
    has_prefix = any(name.startswith("backbone.") for name in source)
    if any(name.startswith("encoder.") for name in source):
        source = encoder_to_classifier(source)
    has_norm = any(name.startswith("backbone.norm.") for name in target)  # Next-ViT's, behind the last map
    drop, fresh = [] if has_prefix else [*_NO_BACKBONE, *([] if has_norm else ["norm."])], []
    weights = {
        name if has_prefix or _matches(name, tuple(drop)) else f"backbone.{name}": value
        for name, value in source.items()
    }
    for norm in sorted({found[0] for name in {*target, *weights} if (found := _MAP_NORM.match(name))}):
        ours, theirs = (any(name.startswith(norm) for name in names) for names in (target, weights))
        if theirs and not ours:
            drop.append(norm)
        if ours and not theirs:
            fresh.append(norm)
    return weights, drop, fresh
