"""The errors that a person can act on: the command line prints their sentence alone.

Any other error is a bug and is printed with its traceback.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.url_secrets import find_secret, redact


class UserError(Exception):
    """An error in one sentence that names the field or file, the value found and the remedy."""

    def __str__(self) -> str:
        return redact(super().__str__())  # libraries quote URLs in their errors, presigned ones too

    @classmethod
    def refuse_secrets(cls, value: Any, name: str = "", source: str = "") -> None:
        """Raise this error if settings or a URL hold a secret, because they are copied into files and logs.

        Args:
            value: a text, or nested mappings and lists.
            name: the name of the value.
            source: the file that holds it.
        """
        if sentence := find_secret(value, name):
            raise cls(f"{source}: {sentence}" if source else sentence)


class OffTrackError(UserError):
    """The gate judges a finished stage off track, and its recipe stops the chain then."""


class RetryableError(UserError):
    """A lost connection or a full disk: the same request may succeed later or on another machine."""


class RecipeError(UserError):
    """A recipe, an override or a change on resume that cannot be accepted."""


class DataError(UserError):
    """A data file that is missing, damaged or not the one that the stage was started with."""


class DataTimeoutError(DataError, RetryableError):
    """A batch that did not arrive in time. This machine's disk may be at fault, so the stage is retried."""


class StageError(UserError):
    """A stage directory that cannot be opened, resumed or written."""


class CheckpointError(UserError):
    """No usable checkpoint, or weights that do not fit the model."""


class UnansweredError(CheckpointError, RetryableError):
    """Storage of checkpoints or weights that does not answer now, or not on this machine, so the stage is retried."""


class OvertakenError(CheckpointError):
    """A newer attempt owns the stage, so this attempt may write nothing any more."""


class LaunchError(UserError):
    """A job that cannot be submitted, queried or cancelled."""


def shortened(value: object, most: int = 120) -> str:
    """Return the value as Python writes it, cut to one short line: a list may have thousands of items."""
    text = repr(value[:most] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words: "1 class", "1,000 classes"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join names by commas. A name too many is also shown: "and 1 more" would be no shorter."""
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]


def describe_full_gpu(error: Exception) -> str:
    """The sentence for torch's OutOfMemoryError in a command that trains nothing."""
    return (
        "a GPU's memory is full; take fewer or smaller images at once (--batch, --image-size; of a recipe,"
        " batch.micro_slots), or free it: `nvidia-smi` shows who holds it"
        f" ({first_line(error)})"
    )
