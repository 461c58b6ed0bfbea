"""Read ImageNet's devkit: its archive, and meta.mat, which names the classes of its numbers."""

import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from pipeline.errors import DataError
from tools.prepare.image_source import base, open_stream

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKIT_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, zlib.error)
"""What reading a damaged meta.mat or ground truth may raise."""

# meta.mat is a MATLAB file of level 5. Only one array of structures of numbers and texts is read.

_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
_STRUCTURE, _CHARACTERS, _FIRST_NUMERIC, _LAST_NUMERIC = 2, 4, 6, 15


def read_devkit(fs: AbstractFileSystem, path: str) -> tuple[bytes, bytes]:
    """Read meta.mat and the ground truth from the devkit's archive.

    Raises:
        DataError: if it is damaged or lacks one of them.
    """
    files: dict[str, bytes] = {}
    try:
        with open_stream(fs, path) as stream, tarfile.open(fileobj=stream) as archive:
            for member in archive:
                if base(member.name) in (META, GROUND_TRUTH):
                    files[base(member.name)] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the devkit again") from None
    if len(files) != 2:
        raise DataError(f"{path} has no {GROUND_TRUTH} and {META}; give ILSVRC2012_devkit_t12.tar.gz")
    return files[META], files[GROUND_TRUTH]


def read_synsets(content: bytes) -> dict[int, tuple[str, str]]:
    """Read meta.mat: ILSVRC2012_ID -> (WNID, words).

    Raises:
        ValueError: if it is not such a file.
    """
    if content[126:128] != b"IM":
        raise ValueError("meta.mat is not a little-endian MATLAB file of level 5")
    for kind, data in _elements(content[128:]):
        if kind == _COMPRESSED:
            ((kind, data),) = _elements(zlib.decompress(data))
        name, value = _matrix(data) if kind == _MATRIX else ("", None)
        if name == "synsets":
            return {int(entry["ILSVRC2012_ID"]): (entry["WNID"], entry["words"]) for entry in value}
    raise ValueError("meta.mat has no synsets")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # a small element: its data of up to four bytes is part of the tag
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[at + 4 : at + 4 + size]
            at += 8
        else:
            yield kind, data[at + 8 : at + 8 + size]
            at += 8 + size + (-size % 8 if kind != _COMPRESSED else 0)


def _matrix(data: bytes) -> tuple[str, Any]:
    """An array's name and value: a list of dicts, a text, or its first number."""
    if not data:
        return "", None
    (_, flags), (_, shape), (_, name), *rest = _elements(data)
    kind = flags[0]
    if kind == _STRUCTURE:
        width = struct.unpack("<i", rest[0][1])[0]
        fields = [
            text.rstrip(b"\0").decode()
            for text in (rest[1][1][i : i + width] for i in range(0, len(rest[1][1]), width))
        ]
        values = [_matrix(part)[1] for _, part in rest[2:]]
        count = int(np.frombuffer(shape, "<i4").prod())
        return name.decode(), [
            dict(zip(fields, values[i * len(fields) : (i + 1) * len(fields)], strict=True)) for i in range(count)
        ]
    if kind == _CHARACTERS:
        return name.decode(), rest[0][1].decode(_TEXTS[rest[0][0]]) if rest else ""
    if _FIRST_NUMERIC <= kind <= _LAST_NUMERIC and rest and rest[0][1]:
        return name.decode(), np.frombuffer(rest[0][1], _NUMBERS[rest[0][0]])[0]
    return name.decode(), None
