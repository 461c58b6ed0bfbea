"""Read and write files in a directory on a local disk or at any fsspec URL.

A written file appears whole or not at all, and survives a power cut: on a local disk by fsync of file and directory
and a rename or link; object stores do so by themselves.
"""

import errno
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import CheckpointError, StageError, UnansweredError
from pipeline.storage.bounded_files import read_file

# Errors of storage that does not answer now, or not on this machine. Lustre's is ESHUTDOWN when it has evicted a node.
UNANSWERED = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.EHOSTDOWN}
)


@dataclass(frozen=True)
class Folder:
    """A directory on any file system; it need not exist."""

    fs: AbstractFileSystem
    path: str

    @classmethod
    def at(cls, url: str | os.PathLike) -> "Folder":
        """Open the folder of a local path or an fsspec URL. Credentials come from the environment.

        Raises:
            StageError: if the URL names a file system that is not installed or does not exist, has one slash, or holds
                a password.
        """
        url = os.fspath(url)
        StageError.refuse_secrets(url)
        if slash := re.match(r"[a-z][a-z0-9]+:/(?!/)", url):  # fsspec would make a local folder of this name
            raise StageError(f"{url} is no URL: write {slash[0]}/{url[slash.end() :]}")
        # No cached listings, because other processes write to the same folder.
        options = {"use_listings_cache": False} if is_remote(url) else {}
        try:
            return cls(*url_to_fs(url, **options))
        except ImportError as error:
            raise StageError(f"{url} needs a file system that is not installed ({error}); pip install it") from None
        except ValueError as error:
            raise StageError(f"{url} is no URL that fsspec knows ({error}); correct it") from None

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def url(self) -> str:
        return self.fs.unstrip_protocol(self.path)

    def __str__(self) -> str:
        return self.path if self.local else self.url

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}")

    def exists(self) -> bool:
        """Whether the folder or file exists. Raises the storage's error when it does not answer, unlike fsspec."""
        try:
            self.fs.info(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def entries(self) -> dict[str, dict[str, Any]]:
        """List the folder: fsspec's information about each entry, by name. Empty when the folder does not exist."""
        self.fs.invalidate_cache(self.path)
        try:
            listing = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {info["name"].rstrip("/").rpartition("/")[2]: info for info in listing if info["name"] != self.path}

    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """Read a whole file; on a local disk a regular one, see `read_file`.

        Raises:
            ValueError: if it holds more than `most_bytes`.
        """
        path = (self / name).path
        if self.local or most_bytes is None:
            return read_file(path, most_bytes) if self.local else self.fs.cat_file(path)
        if len(content := self.fs.cat_file(path, end=most_bytes + 1)) > most_bytes:
            raise ValueError(f"it holds more than {most_bytes} bytes, the most that is read")
        return content

    def publish(self, name: str, data: bytes) -> None:
        """Write or replace a file."""
        if self.local:
            self._write_locally(name, data, os.replace)
        else:
            self.fs.pipe_file((self / name).path, data)

    def create(self, name: str, data: bytes, last_check: Callable[[], None] = lambda: None) -> None:
        """Write a new file. `last_check` runs just before the file appears, and may raise to prevent it.

        On object stores this is one conditional put, which S3, GCS and Azure have.

        Raises:
            FileExistsError: if the file exists; on an object store only if its content differs.
        """
        if self.local:

            def link(temporary: str, target: str) -> None:
                last_check()
                try:
                    os.link(temporary, target)
                except FileExistsError:  # NFS says so too when it is asked again, because its first answer was lost
                    if not os.path.samefile(temporary, target):
                        raise

            self._write_locally(name, data, link)
            return
        last_check()
        try:
            self.fs.pipe_file((self / name).path, data, mode="create")
        except FileExistsError:
            if self.read(name) != data:  # equal content is this put, retried because its first answer was lost
                raise

    def _write_locally(self, name: str, data: bytes, move: Callable[[str, str], None]) -> None:
        os.makedirs(self.path, exist_ok=True)
        temporary = os.path.join(self.path, f"{name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            move(temporary, os.path.join(self.path, name))
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        self.sync()

    def sync(self) -> None:
        """Flush a local directory to disk, so that its file names survive a power cut."""
        if self.local:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def unwritable(path: Path) -> str:
    """Why `publish` cannot write a local file; "" if it can. Tries its nearest folder, and leaves nothing."""
    try:
        if path.is_dir():
            return "it is a folder"
        with TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_writable(path: Path) -> None:
    """Raise StageError if a local file cannot be written, before hours are spent on its content."""
    if why := unwritable(path):
        raise StageError(f"{path} cannot be written ({why}); give another path")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL of another file system than the local one."""
    text = os.fspath(path)
    return "://" in text and not text.startswith(("file://", "local://"))


def is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from the storage; clients of object stores do not all raise OSError."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or library in ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure", "google")


def is_unanswered(error: BaseException) -> bool:
    """Whether an error may be gone at the next try or on another machine."""
    return isinstance(error, OSError) and error.errno in UNANSWERED


def storage_failure(sentence: str, error: BaseException) -> CheckpointError:
    """The error with this sentence about checkpoints or weights that an error of their storage leads to."""
    return UnansweredError(sentence) if is_unanswered(error) else CheckpointError(sentence)


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file at once, so that a power cut leaves the old content or the new one."""
    Folder.at(path.parent).publish(path.name, json_bytes(content))


def json_bytes(content: object) -> bytes:
    """Indented JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()
