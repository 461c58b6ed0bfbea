"""What a committed checkpoint says about itself: pure text in, text out; nothing here touches a disk.

A checkpoint directory holds DCP's data files and `.metadata`, then `manifest.json` (bytes and sha256 of each of
those, and facts about the run), then `COMMIT` (sha256 of the manifest). It exists once COMMIT does.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

MANIFEST, COMMIT, METADATA = "manifest.json", "COMMIT", ".metadata"
_NAME = re.compile(r"step-([0-9]{9})\.([0-9]{6})")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`step-000001234.000002`: step 1234, saved by attempt 2.

    Names sort from old to new: a later attempt's checkpoint is the newer one, even after it had to go back some steps.
    """

    attempt: int
    step: int

    @classmethod
    def parse(cls, text: str) -> "CheckpointName | None":
        """The name, or None for a text that no checkpoint of ours can have."""
        match = _NAME.fullmatch(text)
        return cls(attempt=int(match[2]), step=int(match[1])) if match else None

    def __str__(self) -> str:
        text = f"step-{self.step:09d}.{self.attempt:06d}"
        assert self.parse(text) == self, f"step or attempt out of range: {self.step}, {self.attempt}"
        return text


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Every file of one checkpoint, and JSON facts (why it was saved, world size, recipe, data, versions, engine)."""

    name: CheckpointName
    files: dict[str, FileRecord]
    facts: dict[str, Any]

    def encode(self) -> bytes:
        content = {
            "name": str(self.name),
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()},
            "facts": self.facts,
        }
        return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, text: bytes) -> "Manifest":
        """Raises ValueError for anything `encode` did not write."""
        try:
            content = json.loads(text)
            name = CheckpointName.parse(content["name"])
            files = {key: FileRecord(int(file["bytes"]), str(file["sha256"])) for key, file in content["files"].items()}
            manifest = cls(name, files, dict(content["facts"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        if name is None or METADATA not in files or any("/" in key for key in files):
            raise ValueError("not a manifest: no checkpoint name, no .metadata, or a file outside the directory")
        return manifest


def commit_record(manifest: bytes) -> bytes:
    """The content of COMMIT for an encoded manifest."""
    return (json.dumps({"manifest_sha256": hashlib.sha256(manifest).hexdigest()}) + "\n").encode()
