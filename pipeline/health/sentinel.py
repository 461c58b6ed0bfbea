"""Ends a rank that is stuck in code which never lets another thread run, and says so.

The watchdog is a thread of its rank: such code keeps it from running, too. Other ranks notice; a single one, or all of
them stuck alike, need somebody outside. So each rank has a small process that looks at its beat:
`python -m pipeline.health.sentinel SILENT_SECONDS STAGE ATTEMPT BEAT_FILE RANK_PID`. It counts only time during which
it ran itself, so that a job that is suspended as a whole raises no alarm, and it dies with its rank.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.distributed.processes import die_with_parent
from pipeline.distributed.stop import StopRequest


@contextlib.contextmanager
def run_sentinel(stage_directory: Path, attempt: int, beat_file: Path, silent_seconds: float) -> Iterator[None]:
    """Have this process killed, with its stacks written and its stage told, when the beat does not change for so long.
    In the main thread."""
    arguments = [silent_seconds, stage_directory, attempt, beat_file, os.getpid()]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.health.sentinel", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_silence(beat_file: Path, silent_seconds: float) -> bytes:
    """Return the beat once it has not changed for so long."""
    poll_seconds = min(silent_seconds / 20, 2.0)
    beat, silent, last = b"", 0.0, time.monotonic()
    while silent < silent_seconds:
        time.sleep(poll_seconds)
        now = time.monotonic()
        silent, last = silent + min(now - last, 2 * poll_seconds), now
        found = beat_file.read_bytes()
        if found != beat:
            beat, silent = found, 0.0
    return beat


def tell(stage_directory: Path, attempt: int, beat: bytes, silent_seconds: float) -> None:
    """Record the outcome, unless another rank has. Only now is anything imported that takes time."""
    from pipeline.health.watchdog import Beat
    from pipeline.stage.directory import Stage
    from pipeline.stage.outcome import Outcome, OutcomeKind

    last = Beat(**json.loads(beat))
    sentence = (
        f"rank {last.rank} on {last.host} gave no sign of life for {silent_seconds:.0f} s after {last.phase} of step"
        f" {last.step}, in code that lets no other thread run"
    )
    print(sentence, file=sys.stderr, flush=True)
    stage = Stage(stage_directory)
    stage.attempts.own = attempt
    stage.attempts.record(Outcome(OutcomeKind.BAD_NODE, sentence, last.step))


def show_stacks(rank: int) -> None:
    """Have the rank write them, as its handler can in the midst of such code."""
    from pipeline.health.watchdog import STACKS_SIGNAL

    os.kill(rank, STACKS_SIGNAL)
    time.sleep(0.5)


def main() -> None:
    silent_seconds, stage, attempt, beat_file, rank = sys.argv[1:]
    die_with_parent()
    if os.getppid() != int(rank):
        return
    for number in StopRequest.SIGNALS:  # for the rank, which may get them together with all its children
        signal.signal(number, signal.SIG_IGN)
    beat = wait_for_silence(Path(beat_file), float(silent_seconds))
    with contextlib.suppress(Exception):  # whatever the stage's disk says, the rank must end
        tell(Path(stage), int(attempt), beat, float(silent_seconds))
        show_stacks(int(rank))
    os.kill(int(rank), signal.SIGKILL)


if __name__ == "__main__":
    main()
