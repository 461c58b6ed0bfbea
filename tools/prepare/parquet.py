"""Parquet files with image bytes, the form in which model hubs publish ImageNet.

A column `image` holds bytes, or a struct of bytes and path; a column `label` holds numbers, whose class names are in
the schema's metadata.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.errors import DataError
from tools.prepare.image_source import ImageSource, Item, Stamp, base, with_retries

_MOST_CLASSES = 1_000_000  # without names; each number up to the highest label is a class
_SYNSET = re.compile(r"(?:^|_)(n\d{8})(?:_|\.|$)")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("Parquet needs pyarrow; run `pip install 'fcmae[parquet]'`") from None
    return pyarrow


@dataclass
class ParquetRows:
    """Reader of places (path, row group, row). The last row group stays in memory, because rows are read in order."""

    fs: AbstractFileSystem
    is_struct: bool
    _at: tuple[str, int] | None = field(default=None, repr=False)
    _column: Any = field(default=None, repr=False)

    def read(self, place: tuple[str, int, int]) -> bytes:
        path, group, row = place
        if self._at != (path, group):
            self._column = with_retries(self.fs, path, lambda: self._read_group(path, group))
            self._at = (path, group)
        content = self._column[row].as_py()
        if content is None:
            raise OSError(0, "no bytes in its row")
        return content

    def _read_group(self, path: str, group: int) -> Any:
        arrow = _pyarrow()
        with self.fs.open(path, "rb") as file:
            column = "image.bytes" if self.is_struct else "image"
            table = arrow.parquet.ParquetFile(file).read_row_group(group, columns=[column])
        chunk = table.column("image").combine_chunks()
        return chunk.field("bytes") if self.is_struct else chunk

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at": None, "_column": None}


def parquet_files(fs: AbstractFileSystem, paths: Sequence[str], unlabelled: bool) -> ImageSource:
    """The rows of Parquet files, in the order of the files.

    Where all image paths name a WordNet id (`n01440764_18_n01440764.JPEG`), the ids are the classes, numbered in their
    order, and the schema's names are their descriptions. Otherwise the schema's names are the classes.

    Raises:
        DataError: if a file cannot be read or lacks a column, or labels are negative or without a name.
    """
    arrow = _pyarrow()
    items: list[Item] = []
    numbers: list[int] = []
    stamp, names, is_struct = Stamp(), None, False
    for path in paths:
        try:
            with with_retries(fs, path, lambda path=path: fs.open(path, "rb")) as stream:
                file = arrow.parquet.ParquetFile(stream)
                is_struct = _check_columns(arrow, file.schema_arrow, path, unlabelled)
                own = _label_names(file.schema_arrow)
                if own and names and own != names and not unlabelled:
                    raise DataError(
                        f"{path} names other classes than the files before it, or in another order, so equal numbers"
                        " are other classes; give all files the same names, or use `fcmae prepare --unlabelled`"
                    )
                names = names or own
                stamp.add_file(fs.info(path))
                with_path = is_struct and file.schema_arrow.field("image").type.get_field_index("path") >= 0
                columns = [*([] if unlabelled else ["label"]), *(["image.path"] if with_path else [])]
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    table = file.read_row_group(group, columns=columns) if columns else None
                    numbers += [0] * count if unlabelled else table.column("label").to_pylist()
                    known = table.column("image").combine_chunks().field("path").to_pylist() if with_path else []
                    for row in range(count):
                        name = (known and known[row]) or f"{base(path)}:{group}:{row}"
                        items.append(Item(name, 0, (path, group, row)))
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); copy it again") from None
    if unlabelled:
        return ImageSource("parquet", ("all",), items, ParquetRows(fs, is_struct), stamp.hex())
    bad = next((number for number in numbers if number is None or number < 0), 0)
    if bad != 0 or not numbers:
        raise DataError(
            f"column label of {paths[0]} holds {bad!r}; labels must be 0 or more, or left out by"
            " `fcmae prepare --unlabelled`"
        )
    if names is None and max(numbers) >= _MOST_CLASSES:
        raise DataError(
            f"column label of {paths[0]} holds {max(numbers)}, and its classes have no names; number them from 0, below"
            f" {_MOST_CLASSES:,}"
        )
    names = names or [f"{number:05d}" for number in range(max(numbers) + 1)]
    if max(numbers) >= len(names):
        raise DataError(
            f"column label of {paths[0]} holds {max(numbers)}, but the schema names {len(names)} classes; correct it"
        )
    synsets = _synsets(items, numbers, len(names))
    if synsets is None and len(set(names)) != len(names):
        names = [f"{number:05d} {name}" for number, name in enumerate(names)]
    classes = sorted(synsets) if synsets else list(names)
    place = {name: number for number, name in enumerate(classes)}
    label_of = [place[name] for name in synsets] if synsets else range(len(names))
    items = [Item(item.name, label_of[number], item.place) for item, number in zip(items, numbers, strict=True)]
    descriptions = dict(zip(synsets, names, strict=True)) if synsets else {}
    return ImageSource(
        "parquet", tuple(classes), items, ParquetRows(fs, is_struct), stamp.hex(), descriptions=descriptions
    )


def _check_columns(arrow: Any, schema: Any, path: str, unlabelled: bool) -> bool:
    """Check the columns; return whether the images are structs."""
    types = arrow.types
    kind = schema.field("image").type if "image" in schema.names else None
    is_struct = kind is not None and types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not is_struct and not (kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))):
        raise DataError(f"{path} has no column `image` of bytes, but {', '.join(schema.names)}; rename the column")
    if not unlabelled and not ("label" in schema.names and types.is_integer(schema.field("label").type)):
        raise DataError(
            f"{path} has no column `label` of numbers; add one, or use `fcmae prepare --unlabelled` if there are none"
        )
    return is_struct


def _label_names(schema: Any) -> list[str] | None:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _synsets(items: Sequence[Item], numbers: Sequence[int], count: int) -> list[str] | None:
    """The WordNet id of each label, if the paths of all its images name the same one; else None."""
    id_of: dict[int, str] = {}
    for item, number in zip(items, numbers, strict=True):
        ids = _SYNSET.findall(base(item.name))
        if not ids or id_of.setdefault(number, ids[-1]) != ids[-1]:
            return None
    return [id_of[n] for n in range(count)] if len(id_of) == count == len(set(id_of.values())) else None
