"""Read a file of COCO annotations entry by entry, so that its 860,000 objects are never Python objects all at once."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import DataError
from tools.prepare.coco_objects import ObjectTable

_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def read_annotations(name: str, content: bytes) -> ObjectTable:
    """Read COCO annotations: an object with the lists "images", "annotations" and "categories".

    Args:
        name: of the file, for errors.

    Raises:
        DataError: naming the first entry that cannot be used.
    """
    try:
        text = content.decode("utf-8-sig")
        del content
        return _read(name, text)
    except UnicodeDecodeError:
        raise DataError(f"{name} is no UTF-8 text; name a JSON file of COCO annotations") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} is no JSON ({error.msg} in line {error.lineno}, column {error.colno}); copy or export it again"
        ) from None
    except RecursionError:
        raise DataError(f"{name} is nested too deeply for COCO annotations; name another file") from None


def _read(name: str, text: str) -> ObjectTable:
    table, seen, late = ObjectTable(name), set(), None
    add = {"images": table.add_image, "categories": table.add_category, "annotations": table.add_object}
    for key, at in (members := _Members(name, text)):
        if key not in add:
            members.end = _value(text, at)[1]
            continue
        if key in seen:
            raise DataError(f"{name}: key {key!r} occurs twice; keep one list")
        if text[at : at + 1] != "[":
            raise DataError(f"{name}: {key!r} is no list; give a list of {key}")
        if key == "annotations" and "images" not in seen:  # their masks need the images' sizes
            late, members.end = at, _each(text, at, lambda entry: None)
        else:
            members.end = _each(text, at, add[key])
        seen.add(key)
    for key in add:
        if key not in seen:
            raise DataError(f"{name}: key {key!r} is missing; name a file of COCO annotations of objects")
    if late is not None:
        _each(text, late, table.add_object)
    return table


class _Members:
    """The keys of the object in a text, each with the place of its value; set `end` to where the value ended."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text, self.end = name, text, 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        text, at = self._text, _skip(self._text, 0)
        if text[at : at + 1] in ("[", '"') or text[at : at + 1].isalnum():
            raise DataError(f"{self._name} holds no object of images, annotations and categories; name another file")
        at = _skip(text, _expected(text, at, "{"))
        while text[at : at + 1] != "}":
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting a key in quotes", text, at)
            key, at = _value(text, at)
            yield key, _skip(text, _expected(text, _skip(text, at), ":"))
            at = _next(text, self.end, "}")
        if (at := _skip(text, at + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, at)


def _each(text: str, at: int, action: Callable[[Any], None]) -> int:
    """Call `action` with each element of the list at a place, and return where the list ends."""
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        entry, at = _value(text, at)
        action(entry)
        at = _next(text, at, "]")
    return at + 1


def _next(text: str, at: int, closing: str) -> int:
    """The place of the next element, or of the closing bracket."""
    at = _skip(text, at)
    if text[at : at + 1] == closing:
        return at
    at = _skip(text, _expected(text, at, ","))
    if text[at : at + 1] == closing:
        raise json.JSONDecodeError("Expecting a value after the comma", text, at)
    return at


def _expected(text: str, at: int, character: str) -> int:
    if text[at : at + 1] != character:
        raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
    return at + 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        return _decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads numbers of 4,300 digits at most
        raise json.JSONDecodeError("A number has thousands of digits", text, at) from None
