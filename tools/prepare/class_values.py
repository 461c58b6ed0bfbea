"""Which value of a mask is which class: from a file of class names, ADE20K's table, or the values that occur."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np

from pipeline.data.maps_file import MOST_CLASSES, label_type
from pipeline.errors import DataError

ADE20K_TABLE = "objectInfo150.txt"
IGNORED = "ignored"
"""In a file of classes, the name of values without a class."""
_MOST_VALUE = (1 << 16) - 1
_VALUE_AND_NAME = re.compile(r"(\d+|#[0-9a-fA-F]{6})(?:\s*[,;:=]\s*|\s+)(\S.*)")
_FORMS = "write one class name on each line, in the order of the values from 0 on, or VALUE NAME, or #rrggbb NAME"


@dataclass(frozen=True)
class ClassValues:
    """The classes of masks, and which value, or which colour, means which class."""

    names: tuple[str, ...]
    numbers: Mapping[int, int]
    """Value, or 0xrrggbb of a colour, -> number of the class. Several values may be one class."""
    ignored: frozenset[int] = frozenset()
    """Values or colours of pixels without a class."""
    colours: bool = False
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def with_ignored(self, values: Collection[int]) -> Self:
        """The same with more values ignored, and no classes for them.

        Raises:
            DataError: if such a value has a class of its own, which would then be empty.
        """
        if lost := [value for value in values if value in self.numbers]:
            name = self.names[self.numbers[lost[0]]]
            raise DataError(f"--ignore {lost[0]} is the value of class {name!r}; leave out one of them")
        if self.colours and values:
            raise DataError(
                f"--ignore {min(values)} is a number, but the classes are colours; write '#rrggbb {IGNORED}' lines"
            )
        return replace(self, ignored=self.ignored.union(values))

    def labels(self, pixels: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, (H, W) of `label_type`.

        Args:
            pixels: values (H, W), or colours uint8 (H, W, 3) if `colours`.

        Raises:
            DataError: naming the first pixel whose value has no class.
        """
        if self.colours:
            pixels = pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            keys, classes = self._sorted
            places = np.searchsorted(keys, pixels).clip(max=len(keys) - 1)
            labels = np.where(keys[places] == pixels, classes[places], -1)
        else:
            labels = self._table[pixels]
        if labels.min() < 0:
            row, column = np.unravel_index(int((labels < 0).argmax()), labels.shape)
            raise DataError(f"{self._written(int(pixels[row, column]))} at row {row}, column {column} has no class")
        return labels.astype(label_type(len(self.names))[0])

    def _written(self, value: int) -> str:
        return f"colour #{value:06x}" if self.colours else f"value {value}"

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        ignored = label_type(len(self.names))[1]
        pairs = sorted({**dict.fromkeys(self.ignored, ignored), **self.numbers}.items())
        return np.array([key for key, _ in pairs]), np.array([number for _, number in pairs])

    @cached_property
    def _table(self) -> np.ndarray:
        keys, classes = self._sorted
        table = np.full(_MOST_VALUE + 1, -1, np.int32)
        table[keys] = classes
        return table

    def side_car(self) -> dict[str, str]:
        """The entries of a side-car's settings."""
        form = "#{:06x}" if self.colours else "{}"
        pairs = sorted(self.numbers.items())
        shifts = {value - number for value, number in pairs}
        written = ",".join(f"{form.format(value)}={number}" for value, number in pairs)
        if len(shifts) == 1 and not self.colours:
            written = f"class numbers from {shifts.pop()} on"
        return {"mask_values": written, "ignored_values": ",".join(map(form.format, sorted(self.ignored)))}


def class_values(path: str, content: bytes) -> ClassValues:
    """Read a file of classes.

    It may be ADE20K's `objectInfo150.txt`; or have one name on each line, where the first line is the class of value 0;
    or lines of a value and a name, or of a colour #rrggbb and a name, where values of one name are one class. Values of
    the name `ignored` have no class.

    Raises:
        DataError: if the file is none of these.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"classes {path} are no text in UTF-8; save them as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"classes {path} are empty; {_FORMS}")
    header = [cell.strip().lower() for cell in lines[0][1].split("\t")]
    if {"idx", "name"}.issubset(header):
        return _ade20k(path, header, lines[1:])
    matches = [_VALUE_AND_NAME.fullmatch(line) for _, line in lines]
    if not any(matches):
        return _by_order(path, lines)
    if None in matches:
        line = lines[matches.index(None)][0]
        raise DataError(f"line {line} of classes {path} has no value, and others have; {_FORMS}")
    return _by_value(path, [(line, *match.groups()) for (line, _), match in zip(lines, matches, strict=True) if match])


def _by_order(path: str, lines: list[tuple[int, str]]) -> ClassValues:
    values: dict[str, int] = {}
    for value, (line, name) in enumerate(lines):
        if name in values and name != IGNORED:
            raise DataError(
                f"line {line} of classes {path} repeats {name!r}; give each class a name of its own, or write lines of"
                " VALUE NAME, where values of one name are one class"
            )
        values[name] = value
    ignored = frozenset(value for value, (_, name) in enumerate(lines) if name == IGNORED)
    values.pop(IGNORED, None)
    numbers = {value: number for number, value in enumerate(values.values())}
    return _checked(path, ClassValues(tuple(values), numbers, ignored))


def _by_value(path: str, rows: list[tuple[int, str, str]]) -> ClassValues:
    colours = {key.startswith("#") for _, key, _ in rows}
    if len(colours) > 1:
        raise DataError(
            f"classes {path} have both values and colours; give every class a value, or every class a colour"
        )
    numbers: dict[int, int] = {}
    ignored, number_of = set(), dict[str, int]()
    for line, key, name in rows:
        value = int(key[1:], 16) if key.startswith("#") else int(key)
        if value > _MOST_VALUE and not key.startswith("#"):
            raise DataError(f"line {line} of classes {path} has value {value}, and masks hold 0 to {_MOST_VALUE}")
        if value in numbers or value in ignored:
            raise DataError(f"line {line} of classes {path} gives {key} a second class; leave one")
        if name == IGNORED:
            ignored.add(value)
            continue
        numbers[value] = number_of.setdefault(name, len(number_of))
    return _checked(path, ClassValues(tuple(number_of), numbers, frozenset(ignored), colours == {True}))


def _ade20k(path: str, header: list[str], lines: list[tuple[int, str]]) -> ClassValues:
    """The table of ADE20K's challenge: value 0 has no class, and a class has several names."""
    numbers: dict[int, int] = {}
    texts = []
    for line, text in lines:
        cells = dict(zip(header, (cell.strip() for cell in text.split("\t")), strict=False))
        if not cells.get("idx", "").isdigit() or not cells.get("name"):
            raise DataError(f"line {line} of classes {path} has no Idx and Name; copy the table again")
        numbers[int(cells["idx"])] = len(texts)
        texts.append(cells["name"])
    names = [text.partition(",")[0].partition(";")[0].strip() for text in texts]
    times = Counter(names)
    names = [name if times[name] == 1 else text for name, text in zip(names, texts, strict=True)]
    if len(set(names)) < len(names) or len(numbers) < len(names):
        raise DataError(f"classes {path} have a name or Idx twice; copy the table again")
    descriptions = {name: text for name, text in zip(names, texts, strict=True) if name != text}
    return _checked(path, ClassValues(tuple(names), numbers, frozenset({0} - set(numbers)), False, descriptions))


def _checked(path: str, values: ClassValues) -> ClassValues:
    """The values with those that are ignored by custom: the largest number of 8 and of 16 bits."""
    if not 0 < len(values.names) <= MOST_CLASSES:
        raise DataError(f"classes {path} are {len(values.names):,}; give 1 to {MOST_CLASSES:,}")
    return values if values.colours else _with_custom(values)


def _with_custom(values: ClassValues) -> ClassValues:
    custom = {255, _MOST_VALUE} if len(values.names) <= 255 else {_MOST_VALUE}
    return replace(values, ignored=values.ignored | (custom - set(values.numbers)))


def values_found(found: Collection[int], ignored: Collection[int], place: str) -> ClassValues:
    """Derive the classes from the values that occur in all masks, where no file names them.

    Values from 0 on are class numbers, and 255 (of 16 bits 65535) has no class. Masks of 0 and 255 alone have two
    classes.

    Raises:
        DataError: if the values cannot be class numbers.
    """
    values = sorted(set(found) - set(ignored))
    if values == [0, 255]:
        return _with_custom(ClassValues(("0", "255"), {0: 0, 255: 1}, frozenset(ignored)))
    custom = {255, _MOST_VALUE} if max(set(values) - {255, _MOST_VALUE}, default=0) < 255 else {_MOST_VALUE}
    classes = sorted(set(values) - custom)
    count = classes[-1] + 1 if classes else 0
    named = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
    if count < 2:
        raise DataError(f"the masks in {place} hold {named or 'nothing'} alone, which is no two classes; name another")
    if count > 2 * len(classes):
        raise DataError(
            f"the masks in {place} hold the values {named}, which are no class numbers from 0 on; say which classes"
            " they are by --classes FILE with lines of VALUE NAME"
        )
    numbers = {value: value for value in range(count) if value not in ignored}
    if len(numbers) < count:  # ignored values between the others have no class
        numbers = {value: number for number, value in enumerate(numbers)}
    return _with_custom(ClassValues(tuple(map(str, numbers)), numbers, frozenset(ignored)))
