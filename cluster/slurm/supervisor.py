"""After the ranks of a job have ended: is the stage done, shall the job run again, or is there no hope?

    python -m cluster.slurm.supervisor STAGE_DIRECTORY EXIT_CODE ATTEMPTS_WITHOUT_PROGRESS

The batch script calls it on the first node, outside of any container, with srun's exit code. That all ranks have
flushed and met is then certain, and a job can be requeued too whose rank 0 was killed.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.preflight.bad_nodes import bad_nodes
from cluster.site import Site, stored_site
from cluster.slurm import client
from cluster.slurm.job_history import note_job_event
from cluster.slurm.retry import attempts_without_progress, committed_step
from cluster.slurm.script import JobScript
from cluster.slurm.time_limit import CANCELLED
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.errors import LaunchError, OffTrackError, StageError, UserError
from pipeline.health.verdict import refuse_off_track
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import SrunCode
from pipeline.storage.file_names import RECIPE_FILE
from pipeline.tracking.startup import JOB_STARTED

RETRY_SECONDS = 5
T = TypeVar("T")


def conclude(stage: Stage, code: int, job: str, most_without_progress: int) -> int:
    """The exit code of the job: 0 if the stage is done or goes on, 1 if it ends here, which cancels its dependents."""
    directory = stage.directory
    if stage.done():
        try:
            refuse_off_track(stage)
        except OffTrackError as error:
            return give_up(directory, job, str(error))
        return 0
    last = stage.attempts.owner()
    ours = last is not None and (last["job"], last["restart_count"]) == (job, _restarts())
    if last is not None and not ours and _began_after_us(last):
        # This machine stood still, and Slurm has long since started the job elsewhere: a requeue would end that.
        print(f"stage {directory.name}: attempt {last['attempt']} on {last['host']} has taken over; this one just ends")
        return 1
    outcome = stage.attempts.last_outcome() if ours else None  # a start that got not so far has not said how it ended
    reason = " ".join(outcome.reason.split()) if outcome else f"the ranks ended with exit code {code} and left no word"
    bad = bad_nodes(directory, job)
    if now := bad_nodes(directory, job, _restarts()):
        reason = "; ".join(f"{node} is a bad node ({why})" for node, why in now.items())
    if (directory.parent / CANCELLED).exists():
        print(f"stage {directory.name}: the run was cancelled; `fcmae resume {directory.parent}` continues it")
        note_job_event(directory, "stopped", job, reason="cancelled")
        return 1
    if code == SrunCode.PERMANENT:
        try:
            stage.attempts.check_free()
        except StageError as error:  # the stage is another's, and so are those that wait for it
            print(f"{error}; this job just ends")
            return 1
        return give_up(directory, job, reason)
    committed = committed_step(directory)
    fruitless = attempts_without_progress(directory, committed)
    if fruitless >= most_without_progress:
        return give_up(directory, job, f"{fruitless} attempts in a row committed no step after {committed}: {reason}")
    avoid = _patiently(lambda: _dispensable(directory, [bad, now])) if bad else set()
    if kept := sorted(bad.keys() - avoid):
        reason += f"; {', '.join(kept)} may be used again: too few nodes are left otherwise"
    print(f"stage {directory.name}: {reason}; Slurm is asked to run job {job} again", flush=True)
    note_job_event(directory, "requeued", job, committed=committed, code=code, reason=reason)

    def again() -> None:
        client.requeue_job(job)
        if bad:
            client.exclude_nodes(job, {*avoid, *_site(directory).exclude})

    try:
        _patiently(again)
    except LaunchError as error:
        # Requeued or cancelled by somebody else, in this very moment: then it is no longer ours to decide.
        print(error, flush=True)
        note_job_event(directory, "stopped", job, reason=str(error))
        return 1
    return 0


def _patiently(ask: Callable[[], T]) -> T:
    """Slurm's answer, however long slurmctld is away."""
    while True:
        try:
            return ask()
        except client.NoControllerError as error:
            print(error, flush=True)
            time.sleep(RETRY_SECONDS)


def _site(directory: Path) -> Site:
    return stored_site(directory.parent, directory.name)


def _dispensable(directory: Path, choices: Iterable[Iterable[str]]) -> set[str]:
    """The first of these sets of nodes that the job can do without, by Slurm's own word: enough others are up and have
    what the site asks for. None, if it can do without none: it would wait for ever, while a bad node ends one attempt.

    Raises:
        NoControllerError: if slurmctld does not answer.
    """
    site = _site(directory)
    for nodes in filter(None, choices):
        try:
            without = site.model_copy(update={"exclude": tuple(sorted({*site.exclude, *nodes}))})
            if JobScript(directory, without, Path(__file__).parents[2]).test():
                continue  # it would wait for nodes that are out of service
        except LaunchError as error:
            if any(words in str(error) for words in (*client.AWAY, "had no answer")):
                raise client.NoControllerError(str(error)) from None
            # Another refusal, as where a node may submit nothing, tells nothing of the nodes.
            if any(words in str(error) for words in client.NO_SUCH_NODES):
                continue
        return set(nodes)
    return set()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _began_after_us(attempt: Mapping[str, Any]) -> bool:
    return datetime.fromisoformat(attempt["started"]).timestamp() > float(os.environ.get(JOB_STARTED, "inf"))


def give_up(directory: Path, job: str, reason: str) -> int:
    """End the stage and those that start from it; the code of a failed job."""
    print(f"stage {directory.name} has ended for good: {reason}", flush=True)
    note_job_event(directory, "stopped", job, reason=reason)
    try:
        cancel_dependents(directory, f"stage {directory.name} has ended for good: {reason}")
    except UserError as error:  # Slurm cancels them by itself, though without our words
        print(error, flush=True)
    return 1


def cancel_dependents(directory: Path, reason: str) -> None:
    """Cancel the jobs of all stages that start, directly or not, from the stage of this directory."""
    run, lost = directory.parent, {directory.name}
    for name, recipe in load_recipe(run / RECIPE_FILE).stages.items():
        if recipe.previous in lost:
            lost.add(name)
    waiting = client.query_jobs(names=[f"fcmae-{name}" for name in lost - {directory.name}]) if len(lost) > 1 else []
    for job in waiting:
        if job.live and job.directory.parent == run:
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason=reason)


def main() -> int:
    # The requeue's own SIGTERM to all processes of the job would otherwise end scontrol before it has its answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    directory, code, most_without_progress = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        return conclude(Stage(directory), code, os.environ["SLURM_JOB_ID"], most_without_progress)
    except UserError as error:
        print(error, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
