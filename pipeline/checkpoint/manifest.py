"""Encode and decode a checkpoint's name, manifest and COMMIT. Nothing here reads or writes files.

A checkpoint directory holds DCP's data files and `.metadata`, then `manifest.json` (size and sha256 of each of these
files, and facts about the run), then `COMMIT` (sha256 of the manifest). The checkpoint exists once COMMIT does.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from pipeline.storage.bounded_files import parse_json

MANIFEST, COMMIT, METADATA = "manifest.json", "COMMIT", ".metadata"
_NAME = re.compile(r"step-([0-9]{9})\.([0-9]{6})")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`step-000001234.000002`: step 1234, saved by attempt 2.

    Names sort from old to new: a later attempt's checkpoint is newer even if its step is lower.
    """

    attempt: int
    step: int

    @classmethod
    def parse(cls, text: str) -> "CheckpointName | None":
        """Parse a directory's name; None if it is not a checkpoint's."""
        match = _NAME.fullmatch(text)
        return cls(attempt=int(match[2]), step=int(match[1])) if match else None

    def __str__(self) -> str:
        text = f"step-{self.step:09d}.{self.attempt:06d}"
        assert self.parse(text) == self, f"step or attempt out of range: {self.step}, {self.attempt}"
        return text


@dataclass(frozen=True)
class FileRecord:
    """The expected size in bytes and sha256 in hex of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The records of a checkpoint's files, and JSON facts (why it was saved, world size, recipe, data, versions)."""

    name: CheckpointName
    files: dict[str, FileRecord]
    facts: dict[str, Any]

    def encode(self) -> bytes:
        """The content of manifest.json."""
        content = {
            "name": str(self.name),
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()},
            "facts": self.facts,
        }
        return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, text: bytes) -> "Manifest":
        """Parse manifest.json. Raises ValueError for anything that `encode` does not write."""
        try:
            content = parse_json(text)
            name = CheckpointName.parse(content["name"])
            files = {key: FileRecord(int(file["bytes"]), str(file["sha256"])) for key, file in content["files"].items()}
            manifest = cls(name, files, dict(content["facts"]))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        if name is None or METADATA not in files or any("/" in key for key in files):
            raise ValueError("not a manifest: no checkpoint name, no .metadata, or a file outside the directory")
        return manifest


def commit_record(manifest: bytes) -> bytes:
    """The content of COMMIT for an encoded manifest."""
    return (json.dumps({"manifest_sha256": hashlib.sha256(manifest).hexdigest()}) + "\n").encode()
