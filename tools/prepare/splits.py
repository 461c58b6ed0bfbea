"""Divide images into those for training and those for validation, by hashes of their paths."""

import re
from collections.abc import Sequence

from pipeline.errors import DataError
from pipeline.randomness import text_key


def validation_part(names: Sequence[str], fraction: float, group_by: str | None = None) -> list[bool]:
    """Say for each image, by its path below the source, whether it is for validation.

    Each decision is a hash of one path, so it stays when images are added. With `group_by`, the hash is of what the
    expression's groups match (of the whole match without groups): a patient, slide or scene stays whole.

    Raises:
        DataError: if `group_by` is no regular expression, or a path does not match it.
    """
    if not 0 < fraction < 1:
        raise DataError(f"--split {fraction:g} must lie between 0 and 1; give the fraction for validation, such as 0.1")
    if group_by is None:
        return [_is_held_out(name, fraction) for name in names]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise DataError(f"--group-by {group_by!r} is no regular expression ({error}); correct it") from None
    matches = [pattern.search(name) for name in names]
    missing = [name for name, match in zip(names, matches, strict=True) if match is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"--group-by {group_by!r} does not match {missing[0]}{more}; it must match each image's path")
    groups = [match.groups("") or (match.group(),) for match in matches if match]
    return [_is_held_out(group, fraction) for group in groups]


def _is_held_out(parts: str | tuple[str, ...], fraction: float) -> bool:
    return text_key("validation", *((parts,) if isinstance(parts, str) else parts)) < fraction * 2**63
