"""Print what the ranks of a run have printed, as Slurm jobs or as processes of this machine."""

import time
from pathlib import Path

from cluster.local import rank_log
from cluster.show.status import stage_names
from cluster.slurm.job_history import slurm_directory
from pipeline.errors import LaunchError
from pipeline.stage.attempts import Attempts
from pipeline.storage.bounded_files import read_file
from pipeline.storage.file_names import DONE_FILE
from pipeline.storage.run_records import name_unreadable

POLL_SECONDS = 0.5


def log_files(stage_directory: Path, rank: int) -> list[Path]:
    """A rank's log files, the oldest first: one per job, and one of local runs. Rank 0's also hold the batch script's
    output."""
    of_jobs = slurm_directory(stage_directory).glob(f"*_{rank}_log.out")
    jobs = sorted(of_jobs, key=lambda path: (len(path.name), path.name))  # the names begin with the job's number
    local = [path] if (path := rank_log(stage_directory, rank)).exists() else []
    owner = Attempts(stage_directory, None).owner() or {}
    return [*local, *jobs] if owner.get("job") else [*jobs, *local]


def print_logs(run: Path, stage: str | None, rank: int, lines: int, *, follow: bool) -> None:
    """Print the last lines of each log file of one stage, or of all.

    Args:
        lines: how many of each file.
        follow: also print what is added, until all stages are done.

    Raises:
        StageError: if this is no run directory.
        LaunchError: if there is no such stage.
    """
    names = stage_names(run)
    if stage is not None and stage not in names:
        raise LaunchError(f"there is no stage {stage} in {run}; it has {', '.join(names)}")
    stages = [run / name for name in ([stage] if stage else names)]
    offsets: dict[Path, int] = {}
    last: Path | None = None
    while True:
        finished = all((directory / DONE_FILE).exists() for directory in stages)  # before the files are read
        for path in (path for directory in stages for path in log_files(directory, rank)):
            try:
                new = read_file(path, None, start=offsets.get(path, 0))
            except OSError as error:
                name_unreadable(path, error.strerror)
                continue
            length = offsets.get(path, 0) + len(new)
            if path not in offsets:
                new = b"".join(new.splitlines(True)[-lines:])
            offsets[path] = length
            if new:
                if path != last:
                    print(f"==> {path.relative_to(run)} <==")
                print(new.decode(errors="replace"), end="", flush=True)
                last = path
        if not follow or finished:
            break
        time.sleep(POLL_SECONDS)
    if last is None:
        done = f"has printed nothing, and {stage or 'the run'} is done: see `fcmae report {run}`"
        print(f"rank {rank} {done if finished else 'has not printed anything yet'}")
