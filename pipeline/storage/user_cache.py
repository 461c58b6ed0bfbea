"""Find a folder for what can be made again: compiled code, fonts, prepared data, working copies.

A home directory may be missing, read-only or full. Then a private folder in the directory of temporary files is used.
"""

import os
import tempfile
from functools import cache
from pathlib import Path

# Libraries that keep a cache below the home directory, and the variable that names another place.
CACHES_OF_LIBRARIES = {
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
}


def user_cache() -> Path:
    """Return this user's cache folder, which exists and can be written.

    The first that works of $XDG_CACHE_HOME/fcmae, ~/.cache/fcmae, and `private_folder`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "fcmae"
    return folder if folder.is_absolute() and can_write(folder) else private_folder()


@cache
def private_folder() -> Path:
    """Return a folder of this machine that belongs to this user alone, in the directory of temporary files.

    All processes of the user share it, so that it can hold locks. If another user has taken its name, this process gets
    a new one.
    """
    folder = Path(tempfile.gettempdir()) / f"fcmae-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if folder.is_dir() and not folder.is_symlink() and about.st_uid == os.getuid() and not about.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fcmae-"))


def can_write(folder: Path) -> bool:
    """Return whether files can be made in a folder, which is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def redirect_caches() -> None:
    """Set the caches of libraries to folders below `user_cache` if there is no home directory to write to.

    The processes that this one starts inherit the setting.
    """
    home = os.path.expanduser("~")
    if os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK):
        return
    for variable, name in CACHES_OF_LIBRARIES.items():
        if not os.environ.get(variable):
            os.environ[variable] = str(user_cache() / name)


def keep_compiled_code_local() -> None:
    """Set the caches of torch.compile and Triton to folders on this node's own disk, unless the user has set them.

    That is below $FCMAE_SCRATCH, or else in the directory of temporary files: many ranks read and write thousands of
    small files there, which a shared home directory is slow at. Triton keeps fusing products and sums, which it
    says it will stop doing by default in version 3.10: that would change bits and speed.
    """
    scratch = Path(os.environ.get("FCMAE_SCRATCH") or "/nowhere", "fcmae")
    folder = scratch if scratch.parent.is_dir() and can_write(scratch) else private_folder()
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        if not os.environ.get(variable):
            os.environ[variable] = str(folder / CACHES_OF_LIBRARIES[variable])
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
