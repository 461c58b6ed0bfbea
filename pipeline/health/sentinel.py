"""Kill a rank that hangs in code which lets no other thread run, and record the outcome in its stage.

The watchdog is a thread of its rank, so such code stops the watchdog too. Other ranks notice, but not a single rank,
and not ranks that all hang alike. Therefore each rank has a small process beside it that reads the rank's beat file:
`python -P -m pipeline.health.sentinel SILENT_SECONDS STAGE ATTEMPT BEAT_FILE RANK_PID`. The process counts only time in
which it ran itself, so suspending the whole job raises no alarm, and it dies with its rank.
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

from pipeline.distributed.processes import die_with_parent, module_command
from pipeline.distributed.stop import STOP_SIGNALS


@contextlib.contextmanager
def run_sentinel(stage_directory: Path, attempt: int, beat_file: Path, silent_seconds: float) -> Iterator[None]:
    """Run a sentinel for this process while the block runs. Call it in the main thread.

    When `beat_file` has not changed for `silent_seconds`, the sentinel records the outcome in the stage, lets this
    process write its stacks, and kills it.
    """
    arguments = [silent_seconds, stage_directory, attempt, beat_file, os.getpid()]
    process = subprocess.Popen(
        module_command("pipeline.health.sentinel", *arguments),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_silence(beat_file: Path, silent_seconds: float) -> bytes:
    """Wait until the beat file has not changed for `silent_seconds`; returns its content."""
    poll_seconds = min(silent_seconds / 20, 2.0)
    beat, silent, last = b"", 0.0, time.monotonic()
    while silent < silent_seconds:
        time.sleep(poll_seconds)
        now = time.monotonic()
        ran, last = min(now - last, 2 * poll_seconds), now
        try:
            content = beat_file.read_bytes()
        except OSError:  # a file server that is away says nothing about the rank
            continue
        beat, silent = content, silent + ran if content == beat else 0.0
    return beat


def record_hang(stage_directory: Path, attempt: int, beat: bytes, silent_seconds: float) -> None:
    """Record the outcome in the stage, unless another rank has."""
    # Imported only here because a sentinel runs beside every rank and should start fast.
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


def request_stacks(rank: int) -> None:
    """Make the rank write its stacks; its signal handler runs even in such code."""
    from pipeline.health.watchdog import STACKS_SIGNAL

    os.kill(rank, STACKS_SIGNAL)
    time.sleep(0.5)


def main() -> None:
    """Wait until the rank is silent, then record that and kill the rank."""
    silent_seconds, stage, attempt, beat_file, rank = sys.argv[1:]
    die_with_parent()
    if os.getppid() != int(rank):
        return
    for number in STOP_SIGNALS:  # stop signals sent to the whole process group are meant for the rank
        signal.signal(number, signal.SIG_IGN)
    beat = wait_for_silence(Path(beat_file), float(silent_seconds))
    with contextlib.suppress(Exception):  # the rank must end even if the stage's disk fails
        record_hang(Path(stage), int(attempt), beat, float(silent_seconds))
        request_stacks(int(rank))
    os.kill(int(rank), signal.SIGKILL)


if __name__ == "__main__":
    main()
