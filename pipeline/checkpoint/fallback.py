"""Choose the checkpoint that a stage resumes from."""

from collections.abc import Callable, Sequence

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.errors import CheckpointError


def newest_usable(
    newest: Callable[[], CheckpointName],
    verify: Callable[[CheckpointName], Sequence[str]],
    set_aside: Callable[[CheckpointName, Sequence[str]], object],
    most_fallbacks: int,
) -> CheckpointName:
    """Return the newest checkpoint that verifies.

    Args:
        newest: returns the newest checkpoint that was not set aside, or raises CheckpointError.
        verify: returns the problems of a checkpoint; empty if there are none.
        set_aside: removes a damaged checkpoint from what `newest` looks at.
        most_fallbacks: how many checkpoints may be set aside.

    Raises:
        CheckpointError: if more checkpoints are damaged, or none is left.
    """
    fallbacks = 0
    while problems := verify(name := newest()):
        if fallbacks == most_fallbacks:
            raise CheckpointError(
                f"{fallbacks + 1} checkpoints are damaged, the last one {name} ({problems[0]}); "
                "look after the storage, then run again or raise checkpoint.most_fallbacks"
            )
        fallbacks += 1
        set_aside(name, problems)
    return name
