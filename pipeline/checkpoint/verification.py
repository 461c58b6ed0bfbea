"""Verify a checkpoint directory: read its manifest, then re-read and hash its data files."""

import hashlib
import time

from pipeline.checkpoint.manifest import COMMIT, MANIFEST, CheckpointName, FileRecord, Manifest, commit_record
from pipeline.storage.folder import Folder

READ_ATTEMPTS = 4  # of an object store, with pauses of 1, 2 and 4 seconds
_CHUNK_BYTES = 8 << 20


def file_problem(folder: Folder, name: str, record: FileRecord) -> str | None:
    """Compare a file with its record; returns a sentence about the difference, None when they agree.

    A file on a local disk that cannot be read counts as damaged.

    Raises:
        Exception: the error of an object store that does not answer, which says nothing about the file.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            with folder.fs.open((folder / name).path, "rb") as stream:
                digest, size = hashlib.sha256(), 0
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
            break
        except FileNotFoundError:
            return f"{name} is missing"
        except Exception as error:  # every file system has its own classes of errors
            if folder.local:
                return f"{name} cannot be read ({type(error).__name__}: {error})"
            if attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    if size != record.bytes:
        return f"{name} has {size} bytes instead of {record.bytes}"
    return None if digest.hexdigest() == record.sha256 else f"{name} has another sha256 than was written"


def read_manifest(folder: Folder, name: CheckpointName) -> tuple[Manifest | None, list[str]]:
    """Read the manifest and compare it with COMMIT; data files are not read.

    Returns (manifest, []), or (None, problems). Errors as in `file_problem`.
    """
    texts = []
    for file in (MANIFEST, COMMIT):
        try:
            texts.append(folder.read(file))
        except Exception as error:  # as in file_problem
            if not folder.local and not isinstance(error, FileNotFoundError):
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
