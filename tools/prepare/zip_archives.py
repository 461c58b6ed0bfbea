"""Zip archives, read in place: list the members once, then any process reads any member by its offset."""

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from fsspec import AbstractFileSystem

from pipeline.errors import DataError, first_line
from tools.prepare.image_source import ByteRanges, open_stream

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a member; its data follow behind the name and an extra field
MOST_FILE_BYTES = 1 << 30
_STAMPED = ("name", "size", "mtime", "LastModified", "ETag")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZippedFile(NamedTuple):
    """Where a file lies in an archive: the place that `ZipMembers` reads."""

    archive: str
    offset: int  # of its local header
    packed: int  # bytes
    size: int
    method: int
    checksum: int


def list_zip(fs: AbstractFileSystem, path: str) -> dict[str, ZippedFile | str]:
    """The files of an archive by name, or why one cannot be read. Nothing but the archive's directory is read.

    Raises:
        DataError: if this is no archive, or it is truncated.
    """
    try:
        with open_stream(fs, path) as stream, zipfile.ZipFile(stream) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"archive {path} cannot be read ({first_line(error)}); copy it again") from None
    return {info.filename: _file(path, info) for info in infos}


def archive_stamp(fs: AbstractFileSystem, path: str) -> str:
    """What tells an archive from a changed one: its size and dates, as far as the file system knows them."""
    return repr(sorted((key, str(value)) for key, value in fs.info(path).items() if key in _STAMPED))


def _file(path: str, info: zipfile.ZipInfo) -> ZippedFile | str:
    if info.flag_bits & 1:
        return "it is encrypted"
    if info.compress_type not in _METHODS:
        return "it is compressed by a method that is not read"
    if max(info.file_size, info.compress_size) > MOST_FILE_BYTES:
        return f"{info.file_size:,} bytes are too many"
    return ZippedFile(path, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)


@dataclass(frozen=True)
class ZipMembers:
    """Reader of ZippedFile places, which compares each file with its checksum."""

    fs: AbstractFileSystem

    def read(self, place: tuple) -> bytes:
        file, ranges = ZippedFile(*place), ByteRanges(self.fs)
        header = ranges.read((file.archive, file.offset, _LOCAL_HEADER.size))
        mark, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if mark != b"PK\3\4":
            raise OSError(0, "it is not where its archive's directory says")
        content = ranges.read((file.archive, file.offset + len(header) + name_bytes + extra_bytes, file.packed))
        if file.method == zipfile.ZIP_DEFLATED:
            try:
                content = zlib.decompressobj(-15).decompress(content, file.size + 1)
            except zlib.error as error:
                raise OSError(0, f"it is damaged in its archive ({error})") from None
        if len(content) != file.size or zlib.crc32(content) != file.checksum:
            raise OSError(0, "it is damaged in its archive (its checksum differs)")
        return content
