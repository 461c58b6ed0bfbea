"""Write a checkpoint directory through torch.distributed.checkpoint (DCP): hash every file, write COMMIT last."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
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
from pipeline.checkpoint.save_plan import Planner, pack_pairs
from pipeline.errors import CheckpointError, OvertakenError
from pipeline.storage.folder import Folder

_FILE_NAMES = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(manifest\.json|COMMIT)(\.[0-9a-f]{8}\.tmp)?")


def remove_checkpoint(folder: Folder) -> list[str]:
    """Delete the files that `CommittingWriter` writes, COMMIT first, then the directory if it is empty.

    Returns the names of other entries, which stay. Nothing is deleted recursively.
    """
    entries = folder.entries()
    written = [name for name, info in entries.items() if _FILE_NAMES.fullmatch(name) and info["type"] != "directory"]
    for name in sorted(written, key=lambda name: name != COMMIT):
        folder.fs.rm_file((folder / name).path)
    foreign = sorted(entries.keys() - set(written))
    if not foreign and folder.exists():
        folder.fs.rmdir(folder.path)
    return foreign


class _HashingStream:
    """A binary stream that hashes what is written, and keeps the first error because torch.save hides it."""

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
    """torch's fsspec file system, with a record of every file that it wrote, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb", f"a checkpoint file is opened with mode {mode}"
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


@dataclass(frozen=True)
class FileWritten:
    """The file of one rank. Sent to the coordinator in the place of DCP's WriteResults, which are one for each part."""

    name: str
    record: FileRecord
    places: bytes
    """Where the parts lie in it, in the order of the plan: pairs of an offset and a length."""


class CommittingWriter(FsspecWriter):
    """DCP's fsspec writer. It hashes the files as they are written; `finish`, on the coordinator, commits them.

    Args:
        facts: JSON for the manifest.
        planner: of the save.
        still_current: whether nobody else has taken the stage; asked just before the commit.
    """

    def __init__(
        self,
        folder: Folder,
        name: CheckpointName,
        facts: dict[str, Any],
        planner: Planner,
        still_current: Callable[[], bool],
    ) -> None:
        # The hashing stream syncs when it is closed, because torch syncs before Python's buffer is written out.
        super().__init__(folder.url, sync_files=False, overwrite=False)
        self.fs = _HashingFileSystem()
        self.path = self.fs.init_path(folder.url)
        self._folder, self._name, self._facts, self._still_current = folder, name, facts, still_current
        self._planner = planner

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[FileWritten]]:
        results = super().write_data(plan, planner).wait()
        self._folder.sync()
        places = {result.index: result.storage_data for result in results}
        packed = pack_pairs((places[item.index].offset, places[item.index].length) for item in plan.items)
        done: Future[list[FileWritten]] = Future()
        done.set_result([FileWritten(name, record, packed) for name, record in self.fs.records.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[FileWritten]]) -> None:
        """Write `.metadata`, `manifest.json` and, if `still_current()` is true just then, COMMIT.

        Raises:
            OvertakenError: if a newer attempt has taken the stage; nothing is committed then.
            CheckpointError: if this rank does not see a file of another rank, or if a rank wrote another part of the
                state than the plan says.
        """
        files = [file for (file,) in results]  # one of each rank
        written = {file.name: file.record for file in files}
        self._expect_visible(written)
        content = self._planner.metadata([(file.name, file.places) for file in files])
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "wb") as stream:
            stream.write(content)
        manifest = Manifest(self._name, {**written, METADATA: self.fs.records[METADATA]}, self._facts).encode()
        self._folder.publish(MANIFEST, manifest)
        self._folder.create(COMMIT, commit_record(manifest), last_check=self._refuse_if_overtaken)

    def _expect_visible(self, written: dict[str, FileRecord]) -> None:
        visible = self._folder.entries()
        for name, record in written.items():
            if name not in visible or visible[name]["size"] != record.bytes:
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
