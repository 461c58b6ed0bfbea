"""Checkpoint directories on a local disk or any fsspec URL: durable writes, hashing while writing, COMMIT last."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pipeline.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    METADATA,
    CheckpointName,
    FileRecord,
    Manifest,
    commit_record,
)
from pipeline.errors import CheckpointError, OvertakenError
from pipeline.storage.folder import Folder

READ_ATTEMPTS = 4  # of an object store, with pauses of 1, 2 and 4 seconds
_CHUNK_BYTES = 8 << 20
_WRITTEN_HERE = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(manifest\.json|COMMIT)(\.[0-9a-f]{8}\.tmp)?")


def problem_of(folder: Folder, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file, in words that start with its name; None when it is as recorded.

    On a local disk what cannot be read is damaged. An object store that does not answer proves nothing: that raises.
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
        except Exception as error:  # each file system has its own errors; none of them may pass for a good file
            if folder.local:
                return f"{name} cannot be read ({type(error).__name__}: {error})"
            if attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    if size != record.bytes:
        return f"{name} has {size} bytes instead of {record.bytes}"
    return None if digest.hexdigest() == record.sha256 else f"{name} has another sha256 than was written"


def read_committed(folder: Folder, name: CheckpointName) -> tuple[Manifest | None, list[str]]:
    """The manifest that COMMIT vouches for and no problems, or None and what is wrong. Data files are not looked at."""
    texts = []
    for file in (MANIFEST, COMMIT):
        try:
            texts.append(folder.read(file))
        except Exception as error:  # as in problem_of
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


def verified(folder: Folder, name: CheckpointName) -> tuple[Manifest | None, list[str]]:
    """`read_committed`, and the data files re-read whole: what is wrong is all that is wrong with a checkpoint."""
    manifest, problems = read_committed(folder, name)
    if manifest:
        problems = [p for file, record in sorted(manifest.files.items()) if (p := problem_of(folder, file, record))]
    return (None if problems else manifest), problems


def remove_checkpoint(folder: Folder) -> list[str]:
    """Delete the files that a checkpoint writer writes, COMMIT first, and the directory if that leaves it empty.

    Returns the names of what was left because it is not ours. Nothing is deleted recursively.
    """
    entries = folder.entries()
    ours = [name for name, info in entries.items() if _WRITTEN_HERE.fullmatch(name) and info["type"] != "directory"]
    for name in sorted(ours, key=lambda name: name != COMMIT):
        folder.fs.rm_file((folder / name).path)
    foreign = sorted(entries.keys() - set(ours))
    if not foreign and folder.exists():
        folder.fs.rmdir(folder.path)
    return foreign


class _HashingStream:
    """A binary stream that knows the sha256 of what went through, and the first error, which torch.save would hide."""

    def __init__(self, stream: IO[bytes], local: bool) -> None:
        self._stream, self._local = stream, local
        self._digest, self._bytes = hashlib.sha256(), 0
        self.error: Exception | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            self._stream.write(data)
        except Exception as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        self._bytes += size
        return size

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        if not self._stream.closed:
            self._stream.flush()
            if self._local:
                os.fsync(self._stream.fileno())
            self._stream.close()

    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._digest.hexdigest())


class _HashingFileSystem(FileSystem):
    """torch's fsspec file system that keeps a record of every file it wrote, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb", "the writer writes"
        with super().create_stream(path, mode) as raw:
            stream = _HashingStream(raw, isinstance(self.fs, LocalFileSystem))
            try:
                yield stream
                stream.close()
            except Exception:
                if stream.error is not None:
                    raise stream.error from None
                raise
        self.records[os.fspath(path).rpartition("/")[2]] = stream.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        old, new = (os.fspath(name).rpartition("/")[2] for name in (path, new_path))
        self.records[new] = self.records.pop(old)


@dataclass(frozen=True)
class _FileWritten:
    """Travels to the coordinator among DCP's WriteResults: one file, of one rank."""

    name: str
    record: FileRecord


class CommittingWriter(FsspecWriter):
    """DCP's fsspec writer; the files are hashed as they are written, and the coordinator's `finish` commits them.

    `finish` writes `.metadata`, `manifest.json` and, if `still_current()` is true just then, COMMIT. It raises
    OvertakenError, with nothing committed, when a newer attempt has taken the stage, and CheckpointError when another
    rank's file is not seen.
    """

    def __init__(
        self, folder: Folder, name: CheckpointName, facts: dict[str, Any], still_current: Callable[[], bool]
    ) -> None:
        # torch syncs a file before its last bytes left Python's buffer; the hashing stream syncs when it is closed.
        super().__init__(folder.url, sync_files=False, overwrite=False)
        self.fs = _HashingFileSystem()
        self.path = self.fs.init_path(folder.url)
        self._folder, self._name, self._facts, self._still_current = folder, name, facts, still_current

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        self._folder.sync()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results + [_FileWritten(name, record) for name, record in self.fs.records.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {file.name: file.record for rank in results for file in rank if isinstance(file, _FileWritten)}
        self._expect_all_seen(written)
        super().finish(metadata, [[item for item in rank if isinstance(item, WriteResult)] for rank in results])
        files = {**written, METADATA: self.fs.records[METADATA]}
        manifest = Manifest(self._name, files, self._facts).encode()
        self._folder.publish(MANIFEST, manifest)
        self._folder.create(COMMIT, commit_record(manifest), last_check=self._refuse_if_overtaken)

    def _expect_all_seen(self, written: dict[str, FileRecord]) -> None:
        seen = self._folder.entries()
        for name, record in written.items():
            if name not in seen or seen[name]["size"] != record.bytes:
                raise CheckpointError(
                    f"{self._folder}: rank 0 does not see {name} as another rank wrote it; "
                    "put the stage directory on a file system that all nodes share"
                )

    def _refuse_if_overtaken(self) -> None:
        if not self._still_current():
            raise OvertakenError(
                f"{self._folder} is not committed: a newer attempt than {self._name.attempt} has taken the stage; "
                "let this process end"
            )
