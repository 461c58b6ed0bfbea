"""Read tables of image names and classes: CSV with any usual separator and perhaps a header, or NAME CLASS lines."""

import csv
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import DataError

_SEPARATORS = ("\t", ";", ",")
_NAME_COLUMNS = ("image", "image_id", "imageid", "image_name", "file", "filename", "file_name", "name", "path", "id")
_CLASS_COLUMNS = ("label", "class", "class_name", "classname", "category", "target", "species", "predictionstring")
_KAGGLE = "predictionstring"  # a class and the boxes of its objects; the class is its first word
_FORMS = "write NAME,CLASS on each line, with quotes around what holds a comma, or one class on each line"


class LabelRow(NamedTuple):
    line: int
    name: str
    label: str


def read_label_table(path: str, text: str) -> tuple[str, ...] | list[LabelRow]:
    """Read a text of labels: one class on each line as a tuple, or rows of names and classes.

    Raises:
        DataError: naming the first line that has another form.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"labels {path} are empty; {_FORMS}")
    separator = next((c for c in _SEPARATORS if all(c in line for _, line in lines)), None)
    if separator is None:
        return _by_spaces(path, lines)
    rows = _csv_rows(path, text, separator)
    header = [cell.lower() for cell in rows[0][1]]
    widths = len(rows[0][1])
    if has_header := not {*_NAME_COLUMNS, *_CLASS_COLUMNS}.isdisjoint(header):
        rows = rows[1:]
    name, label = _columns(path, header if has_header else None, widths)
    table = []
    for line, cells in rows:
        if len(cells) != widths:
            raise DataError(f"line {line} of labels {path} has {len(cells)} columns instead of {widths}; correct it")
        if not cells[name] or not cells[label]:
            raise DataError(f"line {line} of labels {path} has an empty name or class; correct it")
        kaggle = has_header and header[label] == _KAGGLE
        table.append(LabelRow(line, cells[name], cells[label].split()[0] if kaggle else cells[label]))
    return table


def _by_spaces(path: str, lines: Sequence[tuple[int, str]]) -> tuple[str, ...] | list[LabelRow]:
    words = [(number, line.split()) for number, line in lines]
    if all(len(parts) == 1 for _, parts in words):
        return tuple(line.strip() for _, line in lines)
    for number, parts in words:
        if len(parts) != 2 or any(parts[0].endswith(c) or c in parts[0] for c in _SEPARATORS):
            raise DataError(f"line {number} of labels {path} is neither one class nor NAME CLASS: {parts}; {_FORMS}")
    return [LabelRow(number, *parts) for number, parts in words]


def _csv_rows(path: str, text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator, skipinitialspace=True, strict=True)
    rows = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} of labels {path} cannot be read as CSV ({error}); correct it"
        ) from None
    return rows


def _columns(path: str, header: Sequence[str] | None, width: int) -> tuple[int, int]:
    """The columns of names and of classes."""
    if width == 2:
        swapped = header is not None and header[0] in _CLASS_COLUMNS and header[1] in _NAME_COLUMNS
        return (1, 0) if swapped else (0, 1)
    names = [n for n, title in enumerate(header or ()) if title in _NAME_COLUMNS]
    labels = [n for n, title in enumerate(header or ()) if title in _CLASS_COLUMNS]
    if len(names) == 1 and len(labels) == 1:
        return names[0], labels[0]
    found = f"the header {', '.join(header)}" if header else "no header"
    raise DataError(
        f"labels {path} have {width} columns and {found}; name one of them `image` and one `label`, or"
        " leave two columns"
    )
