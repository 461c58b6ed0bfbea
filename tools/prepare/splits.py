"""Divide images into those for training and those for validation, by hashes of their paths."""

import math
import re
from collections.abc import Sequence

from pipeline.errors import DataError, listed
from pipeline.randomness import text_key

_KEYS = 2**63  # more than any key


def validation_part(names: Sequence[str], fraction: float, group_by: str | None = None) -> list[bool]:
    """Say for each image, by its path below the source, whether it is for validation.

    Each decision is a hash of one path, so it stays when images are added. With `group_by`, the hash is of what the
    expression's groups match (of the whole match without groups): a patient, slide or scene stays whole.

    Raises:
        DataError: if `group_by` is no regular expression, or a path does not match it.
    """
    if not 0 < fraction < 1:
        raise DataError(f"--split {fraction:g} must lie between 0 and 1; give the fraction for validation, such as 0.1")
    return [key < fraction * _KEYS for key in _keys(names, group_by)]


def describe_split(names: Sequence[str], held: int, count: int, fraction: float, group_by: str | None = None) -> str:
    """Say that `held` of the `count` images that were stored are held out, and what to do if far fewer or more were
    asked for. `names` are those of the source."""
    wanted = fraction * count
    said = f"held out for validation: {held:,} of {count:,} images"
    pairs = (held, wanted), (count - held, count - wanted)
    if all(max(asked, 1) / 2 <= number <= 2 * max(asked, 1) for number, asked in pairs):
        return said
    better, unit = better_fraction(names, fraction, group_by), "path" if group_by is None else "group"
    return (
        f"{said}, and --split {fraction:g} asks for about {max(wanted, 1):.0f}: a hash of each {unit} decides, so small"
        f" numbers vary; repeat with {better}, or with more images"
    )


def better_fraction(names: Sequence[str], fraction: float, group_by: str | None = None) -> str:
    """Name the option that holds out about as many images as a fraction asks for, such as "--split 0.17 (4 images)"."""
    keys = sorted(_keys(names, group_by))
    wanted = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    # Images of one group have one key.
    counts = sorted((n for n in range(1, len(keys)) if keys[n - 1] < keys[n]), key=lambda n: abs(n - wanted))
    for count in counts:
        for digits in range(1, 7):
            rounded = round(math.ceil(keys[count - 1] / _KEYS * 10**digits) / 10**digits, digits)
            if rounded < 1 and sum(key < rounded * _KEYS for key in keys) == count:
                return f"--split {rounded:g} ({count:,} image{'' if count == 1 else 's'})"
    return "another --split"


def _keys(names: Sequence[str], group_by: str | None) -> list[int]:
    """A key from 0 to `_KEYS` for each image: those below a fraction of `_KEYS` are held out."""
    if group_by is None:
        return [text_key("validation", name) for name in names]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise DataError(f"--group-by {group_by!r} is no regular expression ({error}); correct it") from None
    matches = [pattern.search(name) for name in names]
    missing = [name for name, match in zip(names, matches, strict=True) if match is None]
    if missing:
        raise DataError(f"--group-by {group_by!r} does not match {listed(missing, 1)}; it must match each image's path")
    return [text_key("validation", *(match.groups("") or (match.group(),))) for match in matches if match]
