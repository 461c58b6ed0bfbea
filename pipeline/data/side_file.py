"""Files beside a .beton file, such as its label maps: written once, hashed, and opened memory-mapped.

`SIDE FILE = header | content | index`. The side-car of the .beton file holds the hash of the whole file, and another
one of header and index, which is compared whenever the file is opened.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import DataError

Count = Annotated[int, Field(ge=0, lt=2**40)]
"""A number of images or objects."""


class SideFile(BaseModel):
    """What a side-car says of every side file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str  # of the whole file
    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    index_sha256: str  # of header and index


class SideFileWriter:
    """Write a side file under another name, and `publish` it when it is finished."""

    count: int
    """The number of images whose entries were added."""

    def __init__(self, partial: Path, header: bytes) -> None:
        self._partial = partial
        self._file = partial.open("wb")
        self._digest, self._end = hashlib.sha256(), 0
        self._index_digest = hashlib.sha256(header)
        self._write(header)

    def publish(self, path: Path) -> None:
        """Give the finished file its name."""
        self._partial.replace(path)

    def close(self) -> None:
        """Close the file, and remove it unless it was published."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._end += len(content)

    def _write_index(self, index: bytes) -> SideFile:
        """Write the index, sync the file to disk, and return its entry for the side-car."""
        self._index_digest.update(index)
        self._write(index)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return SideFile(sha256=self._digest.hexdigest(), bytes=self._end, index_sha256=self._index_digest.hexdigest())


def open_side_file(
    path: Path, stated: SideFile, kind: str, header: np.ndarray, index_bytes: int
) -> tuple[np.ndarray, bytes]:
    """Compare a side file with its side-car, and return its bytes, memory-mapped, and its index.

    Args:
        kind: the content, for errors: "label maps" or "objects".
        header: as it must be.
        index_bytes: length of the index.

    Raises:
        DataError: if the file is missing, or its size, header or index differ from the side-car.
    """
    try:
        if not path.is_file():
            raise DataError(f"{kind} {path} do not exist; copy them too, or prepare again")
        if (size := path.stat().st_size) != stated.bytes:
            raise DataError(f"{path} has {size} bytes instead of {stated.bytes}; copy or prepare it again")
        if size < header.nbytes + index_bytes:
            raise DataError(f"the side-car of {path} names more {kind} than it can hold; prepare again")
        file = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{kind} {path} cannot be read: {error.strerror}; make them readable") from None
    head, index = file[: header.nbytes].tobytes(), file[size - index_bytes :].tobytes()
    digest = hashlib.sha256(head)
    digest.update(index)
    if digest.hexdigest() != stated.index_sha256:
        raise DataError(f"the index of {path} is damaged (its hash differs from the side-car's); copy it again")
    if head != header.tobytes():
        raise DataError(f"the header of {path} is not that of such {kind}; prepare again")
    return file, index
