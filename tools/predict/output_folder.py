"""The folder that a prediction writes its files to, so that those of an earlier prediction do not stay among them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError
from pipeline.storage.bounded_files import read_text

INDEX = "predictions.jsonl"  # a line for each file that `fcmae predict` wrote: its path in the folder, and its SHA-256


class OutputFolder:
    """A folder with the files of one prediction, and an index of them.

    Before the first file is added, those that the index of an earlier prediction names are removed, unless somebody has
    changed them since. Other files stay.

    Args:
        keep: files that stay, because this prediction reads them.
    """

    def __init__(self, path: Path, keep: Iterable[str] = ()) -> None:
        self.path = path
        self._kept = {os.path.realpath(name) for name in keep}
        self._own: set[Path] = set()
        self._removed = 0

    def add(self, name: str | Path, content: bytes) -> Path:
        """Note in the index that a file with this content will be written; return its path. Its folder is made.

        Raises:
            OSError: if the folder cannot be changed.
            UserError: if the index of an earlier prediction is damaged.
        """
        if not self._own:
            self._clear()
        # Noted before it is written, so that a killed command leaves no file that no index names.
        with (self.path / INDEX).open("a") as index:
            index.write(json.dumps({"path": Path(name).as_posix(), "sha256": _hash(content)}) + "\n")
        path = self.path / name
        self._own.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _clear(self) -> None:
        """Remove the files of an earlier prediction, and begin a new index."""
        self.path.mkdir(parents=True, exist_ok=True)
        index = self.path / INDEX
        for file, sha256 in _entries(index) if index.exists() else ():
            if not file.is_file() or file.is_symlink() or os.path.realpath(file) in self._kept:
                continue
            if _hash(file.read_bytes()) == sha256:  # nobody has changed it since
                file.unlink()
                self._removed += 1
                _remove_empty_folders(file.parent, self.path)
        index.write_bytes(b"")

    def notes(self, folders: Sequence[str]) -> Iterator[str]:
        """Say what was removed, and how many files of others are in these folders."""
        if self._removed:
            files = "1 file" if self._removed == 1 else f"{self._removed:,} files"
            yield f"{self.path}: {files} of an earlier prediction removed"
        for name in folders:
            others = sum(path.is_file() and path not in self._own for path in (self.path / name).rglob("*"))
            if others:
                files = "1 file" if others == 1 else f"{others:,} files"
                yield f"{self.path / name} also holds {files} that this command did not write; they are left there"


def _entries(index: Path) -> Iterator[tuple[Path, str]]:
    """The files that an index names inside its folder, and their hashes."""
    try:
        # The last line of a killed command may be cut off.
        for line in read_text(index).split("\n")[:-1]:
            entry = json.loads(line)
            name = PurePosixPath(entry["path"])
            if not name.is_absolute() and ".." not in name.parts:
                yield index.parent / name, entry["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{index} is damaged; give another --out, or remove it and the old predictions") from None


def _remove_empty_folders(folder: Path, top: Path) -> None:
    while folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
