"""Errors a person can act on: the command line prints the sentence alone. Anything else is a bug, with a traceback."""


class UserError(Exception):
    """One sentence that names the field or file, the value and the remedy."""


class OffTrackError(UserError):
    """A finished stage that its gate judges off track, where the recipe wants the chain to stop then."""


class RetryableError(UserError):
    """A lost connection, a full disk: what was asked for is right, and later or on another machine it may work."""


class RecipeError(UserError):
    """A recipe, an override or a change on resume that cannot be accepted."""


class DataError(UserError):
    """A data file that is missing, damaged or not the one the stage was started with."""


class DataTimeoutError(DataError, RetryableError):
    """A batch that did not come in time: perhaps this machine's disk, so worth another attempt."""


class StageError(UserError):
    """A stage directory that cannot be opened, continued or written."""


class CheckpointError(UserError):
    """No usable checkpoint, or weights that do not fit the model."""


class OvertakenError(CheckpointError):
    """A newer attempt has taken the stage: this one may write nothing any more."""


class LaunchError(UserError):
    """A job cannot be submitted, queried or cancelled."""
