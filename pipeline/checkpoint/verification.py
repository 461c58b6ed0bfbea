"""Verify a checkpoint directory: read its manifest, then re-read and hash its data files."""

import errno
import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from pipeline.checkpoint.manifest import COMMIT, MANIFEST, CheckpointName, FileRecord, Manifest, commit_record
from pipeline.storage.folder import Folder, is_unanswered

T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0)  # seconds between the attempts to read what an object store or a file server does not answer
_CHUNK_BYTES = 8 << 20


def file_problem(folder: Folder, name: str, record: FileRecord) -> str | None:
    """Compare a file with its record; returns a sentence about the difference, None when they agree.

    A file on a local disk that cannot be read counts as damaged.

    Raises:
        Exception: the error of an object store or file server that does not answer, which says nothing about the file.
    """
    try:
        size, sha256 = _patiently(folder, partial(_hash, folder, name))
    except FileNotFoundError:
        return f"{name} is missing"
    except Exception as error:  # every file system has its own classes of errors
        if not _is_damage(folder, error):
            raise
        return f"{name} cannot be read ({type(error).__name__}: {error})"
    if size != record.bytes:
        return f"{name} has {size} bytes instead of {record.bytes}"
    return None if sha256 == record.sha256 else f"{name} has another sha256 than was written"


def _hash(folder: Folder, name: str) -> tuple[int, str]:
    """The size of a file in bytes and its SHA-256."""
    with folder.fs.open((folder / name).path, "rb") as stream:
        digest, size = hashlib.sha256(), 0
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _patiently(folder: Folder, read: Callable[[], T]) -> T:
    """Read again what the storage did not answer."""
    for pause in PAUSES:
        try:
            return read()
        except Exception as error:
            if isinstance(error, FileNotFoundError) or (folder.local and not is_unanswered(error)):
                raise
        time.sleep(pause)
    return read()


def _is_damage(folder: Folder, error: Exception) -> bool:
    """Whether an error that remains says something about the file: a damaged disk answers EIO."""
    if isinstance(error, FileNotFoundError):
        return True
    return folder.local and (not is_unanswered(error) or error.errno == errno.EIO)


def read_manifest(folder: Folder, name: CheckpointName) -> tuple[Manifest | None, list[str]]:
    """Read the manifest and compare it with COMMIT; data files are not read.

    Returns (manifest, []), or (None, problems). Errors as in `file_problem`.
    """
    texts = []
    for file in (MANIFEST, COMMIT):
        try:
            texts.append(_patiently(folder, partial(folder.read, file)))
        except Exception as error:  # as in file_problem
            if not _is_damage(folder, error):
                raise
            return None, [f"{file} cannot be read ({type(error).__name__}: {error})"]
    text, record = texts
    if record != commit_record(text):
        return None, [f"{COMMIT} does not belong to {MANIFEST}"]
    try:
        manifest = Manifest.decode(text)
    except ValueError as error:
        return None, [f"{MANIFEST}: {error}"]
    if manifest.name != name:
        return None, [f"{MANIFEST} is that of {manifest.name}"]
    return manifest, []


def verify_checkpoint(folder: Folder, name: CheckpointName) -> tuple[Manifest | None, list[str]]:
    """Read the manifest and every data file in full; returns (manifest, []), or (None, all problems)."""
    manifest, problems = read_manifest(folder, name)
    if manifest:
        problems = [p for file, record in sorted(manifest.files.items()) if (p := file_problem(folder, file, record))]
    return (None if problems else manifest), problems
