"""Read the records of a run: JSON objects that this program wrote, and that a full disk or a person may have damaged.

Who can do without a record uses `read_record` or `decode_record`: a record that cannot be read counts as absent, and is
named once on stderr. Who would train on something else without it uses `required_record`.
"""

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import StageError, first_line
from pipeline.storage.bounded_files import parse_json, read_file
from pipeline.url_secrets import redact

_named: set[str] = set()


def name_unreadable(path: object, why: object) -> None:
    """Say on stderr, once in a process for each file, that a file of a run cannot be read and counts as absent."""
    if str(path) not in _named:
        _named.add(str(path))
        print(redact(f"{path} cannot be read ({why}), so it counts as absent"), file=sys.stderr, flush=True)


def decode_record(content: bytes, name: object) -> dict[str, Any]:
    """The JSON object in a file's content; empty if there is none, which is named."""
    try:
        return _object(content)
    except ValueError as error:
        name_unreadable(name, first_line(error))
        return {}


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file, or no object in it, which is named."""
    try:
        return _object(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        name_unreadable(path, first_line(error))
        return {}


def required_record(path: Path, remedy: str, is_valid: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Args:
        remedy: what to do if it cannot be read.
        is_valid: whether an object is such a record.

    Raises:
        StageError: if it cannot be read.
    """
    try:
        record = _object(read_file(path))
        if not is_valid(record):
            raise ValueError("it is no such record")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({first_line(error)}); {remedy}") from None


def _object(content: bytes) -> dict[str, Any]:
    record = parse_json(content)
    if not isinstance(record, dict):
        raise ValueError("it holds no JSON object")
    return record


def text_of(record: dict[str, Any], name: str) -> str | None:
    """The field `name` of a record if it is a text, else None."""
    value = record.get(name)
    return value if isinstance(value, str) else None


def count_of(record: dict[str, Any], name: str) -> int | None:
    """The field `name` of a record if it is an integer of at least 0, else None."""
    value = record.get(name)
    return value if is_count(value) else None


def time_of(record: dict[str, Any], name: str) -> float | None:
    """An ISO date and time in a record, in epoch seconds; None if it is none."""
    try:
        return datetime.fromisoformat(record[name]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def holds_texts(record: dict[str, Any]) -> bool:
    """Whether all values of a record are texts."""
    return all(isinstance(value, str) for value in record.values())


def is_count(value: Any) -> bool:
    """Whether a value is an integer from 0 to 10^15."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10**15
