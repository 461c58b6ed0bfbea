"""Decide after the ranks of a job have ended: is the stage done, is it retried, or has it failed?

    python -m cluster.slurm.supervisor STAGE_DIRECTORY EXIT_CODE ATTEMPTS_WITHOUT_PROGRESS

The batch script calls it with srun's exit code, on the first node and outside of any container. Then all ranks have
ended, and the job can be requeued even if its rank 0 was killed.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.preflight.bad_nodes import bad_nodes, every_node_is_bad
from cluster.site import stored_site
from cluster.slurm import client
from cluster.slurm.job_history import note_job_event
from cluster.slurm.retry import attempts_without_progress, committed_step
from cluster.slurm.script import JobScript
from cluster.slurm.time_limit import CANCELLED_FILE
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.errors import LaunchError, OffTrackError, StageError, UserError
from pipeline.health.verdict import refuse_off_track
from pipeline.recipe import load_recipe
from pipeline.stage.device_errors import program_at_fault, returning_node
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import SrunCode
from pipeline.storage.file_names import RECIPE_FILE
from pipeline.tracking.startup import JOB_STARTED

ASK_AGAIN_SECONDS = 5
PROGRAM_IS_SUSPECT = (
    "; every node of the last starts was bad within minutes, so the program or the site's preflight settings are the"
    " suspect, and no node is excluded"
)
T = TypeVar("T")


def conclude(stage: Stage, code: int, job: str, most_without_progress: int) -> int:
    """Requeue the job or cancel the stages that depend on its stage.

    Args:
        code: srun's exit code.
        most_without_progress: retry the stage until so many attempts in a row committed no step.

    Returns:
        The exit code of the job: 0 if the stage is done or retried; 1 if it ends here, which fails its dependents.
    """
    directory = stage.directory
    if stage.done():
        try:
            refuse_off_track(stage)
        except OffTrackError as error:
            return fail(directory, job, str(error))
        return 0
    owner = stage.attempts.owner()
    own = owner is not None and (owner["job"], owner["restart_count"]) == (job, _restarts())
    if owner is not None and not own and _began_after_this_job(owner):
        # This machine stood still while Slurm restarted the job elsewhere; a requeue would end the new start.
        print(f"stage {directory.name}: attempt {owner['attempt']} on {owner['host']} has taken over; this job ends")
        return 1
    reason = _why_the_ranks_ended(stage, code, job, own)
    if (directory.parent / CANCELLED_FILE).exists():
        print(f"stage {directory.name}: the run was cancelled; `fcmae resume {directory.parent}` resumes it")
        note_job_event(directory, "stopped", job, reason="cancelled")
        return 1
    if code == SrunCode.PERMANENT:
        try:
            stage.attempts.check_free()
        except StageError as error:  # another job runs the stage, and the dependents wait for that one
            print(f"{error}; this job ends")
            return 1
        return fail(directory, job, reason)
    errors = stage.attempts.device_errors()
    if not own or not errors or errors[-1].attempt != owner["attempt"]:
        errors = []  # this start ended for another reason
    if sentence := program_at_fault(errors):
        return fail(directory, job, sentence)
    committed = committed_step(directory)
    count = attempts_without_progress(directory, committed)
    if count >= most_without_progress:
        return fail(directory, job, f"{count} attempts in a row committed no step after {committed}: {reason}")
    return retry(directory, job, code, committed, reason, returning_node(errors))


def _why_the_ranks_ended(stage: Stage, code: int, job: str, own: bool) -> str:
    """`own`: whether the newest attempt is of this start of the job; otherwise its outcome says nothing about it."""
    if bad := bad_nodes(stage.directory, job, _restarts()):
        nodes = "; ".join(f"{node} is a bad node ({trouble})" for node, trouble in bad.items())
        return nodes + (PROGRAM_IS_SUSPECT if _every_node_is_bad(stage.directory, job) else "")
    if own and (outcome := stage.attempts.last_outcome()):
        return " ".join(outcome.reason.split())
    return f"the ranks ended with exit code {code} and recorded no reason"


def retry(directory: Path, job: str, code: int, committed: int, reason: str, suspect: str | None = None) -> int:
    """Requeue the job, without the nodes that it found bad; the exit code of the job.

    Args:
        suspect: a node to leave out as well, because an error came back to it that another node may not have.
    """
    bad = bad_nodes(directory, job)
    choices = [set(bad), set(bad_nodes(directory, job, _restarts()))]
    if suspect:
        choices = [nodes | {suspect} for nodes in choices]
        reason += f"; it came back to {suspect}, so the next start tries another node"
    excluded: set[str] = set()
    if not _every_node_is_bad(directory, job):
        excluded = _until_answered(lambda: _nodes_to_exclude(directory, choices)) if choices[0] else excluded
        if kept := sorted(choices[0] - excluded):
            reason += f"; {', '.join(kept)} may be used again: too few nodes are left otherwise"
    print(f"stage {directory.name}: {reason}; it is retried: Slurm is asked to requeue job {job}", flush=True)
    note_job_event(directory, "requeued", job, committed=committed, code=code, reason=reason)

    def requeue() -> None:
        client.requeue_job(job)
        if bad or suspect:
            client.exclude_nodes(job, {*excluded, *stored_site(directory.parent, directory.name).exclude})

    try:
        _until_answered(requeue)
    except LaunchError as error:
        # Somebody else requeued or cancelled the job in this moment, so the decision is no longer ours.
        print(error, flush=True)
        note_job_event(directory, "stopped", job, reason=str(error))
        return 1
    return 0


def _every_node_is_bad(directory: Path, job: str) -> bool:
    return every_node_is_bad(directory, job, _restarts(), stored_site(directory.parent, directory.name).nodes)


def _until_answered(ask: Callable[[], T]) -> T:
    """Slurm's answer, however long slurmctld is away."""
    while True:
        try:
            return ask()
        except client.NoControllerError as error:
            print(error, flush=True)
            time.sleep(ASK_AGAIN_SECONDS)


def _nodes_to_exclude(directory: Path, choices: Sequence[Collection[str]]) -> set[str]:
    """The first of these sets of nodes that the job can do without: by Slurm's own test enough other nodes are up and
    have what the site asks for. Exclude nothing if too few nodes would remain: waiting for ever is worse than one
    failed attempt.

    Raises:
        NoControllerError: if slurmctld does not answer.
    """
    site = stored_site(directory.parent, directory.name)
    for nodes in filter(None, choices):
        try:
            without = site.model_copy(update={"exclude": tuple(sorted({*site.exclude, *nodes}))})
            if JobScript(directory, without, Path(__file__).parents[2]).test():
                continue  # the job would wait for nodes that are out of service
        except client.NoControllerError:
            raise
        except LaunchError as error:
            # Any other refusal, such as that this node may not submit, says nothing about the nodes.
            if any(words in str(error) for words in client.NO_SUCH_NODES):
                continue
        return set(nodes)
    return set()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _began_after_this_job(attempt: Mapping[str, Any]) -> bool:
    return datetime.fromisoformat(attempt["started"]).timestamp() > float(os.environ.get(JOB_STARTED, "inf"))


def fail(directory: Path, job: str, reason: str) -> int:
    """End the stage and the stages that depend on it; the exit code of a failed job."""
    sentence = f"stage {directory.name} failed: {reason}"
    print(sentence, flush=True)
    note_job_event(directory, "stopped", job, reason=reason)
    try:
        cancel_dependents(directory, sentence)
    except UserError as error:  # Slurm cancels them by itself, but without our reason
        print(error, flush=True)
    return 1


def cancel_dependents(directory: Path, reason: str) -> None:
    """Cancel the jobs of all stages that start, directly or not, from the stage of this directory."""
    run, failed = directory.parent, {directory.name}
    for name, recipe in load_recipe(run / RECIPE_FILE).stages.items():
        if recipe.previous in failed:
            failed.add(name)
    dependents = failed - {directory.name}
    for job in client.query_jobs(stages=dependents) if dependents else []:
        if job.live and job.directory.parent == run:
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason=reason)


def main() -> int:
    # A requeue sends SIGTERM to all processes of the job, which would end scontrol before its answer has come.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    directory, code, most_without_progress = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        return conclude(Stage(directory), code, os.environ["SLURM_JOB_ID"], most_without_progress)
    except UserError as error:
        print(error, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
