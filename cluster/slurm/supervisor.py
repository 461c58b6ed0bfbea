"""Decide after the ranks of a job have ended: is the stage done, is it retried, or has it failed?

    python -m cluster.slurm.supervisor STAGE_DIRECTORY EXIT_CODE ATTEMPTS_WITHOUT_PROGRESS

The batch script calls it with srun's exit code, on the first node and outside of any container. Then all ranks have
ended, and the job can be requeued even if its rank 0 was killed.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluster.preflight.bad_nodes import bad_nodes, every_node_is_bad
from cluster.site import Site, stored_site
from cluster.slurm import client
from cluster.slurm.decision import Action, JobEnd, choose_exclusion, decide, dependent_stages
from cluster.slurm.job_history import note_decision, note_job_event, read_job_history
from cluster.slurm.retry import newest_commit, steps_at_starts
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
from pipeline.storage.folder import is_unanswered
from pipeline.storage.run_records import is_count
from pipeline.url_secrets import redact_tracebacks

ASK_AGAIN_SECONDS = 5
TRIES = 6  # while the file system of the run does not answer
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
    commit = newest_commit(directory)
    end = collect_facts(stage, code, job, most_without_progress, commit.step)
    decision = decide(end)
    note_decision(directory, job, restarts=_restarts(), **commit._asdict(), end=end.record(), **asdict(decision))
    if decision.action is Action.RETRY:
        return retry(directory, job, end, decision.reason)
    if decision.action is Action.FAIL:
        return fail(directory, job, decision.reason)
    if decision.action is Action.STOP:
        print(f"stage {directory.name}: the run was cancelled; `fcmae resume {directory.parent}` resumes it")
        note_job_event(directory, "stopped", job, reason=decision.reason)
        return 1
    if decision.action is Action.LEAVE:
        print(f"{decision.reason}; this job ends")
        return 1
    return 0


def collect_facts(stage: Stage, code: int, job: str, most_without_progress: int, committed: int) -> JobEnd:
    """The facts about a job of a stage whose ranks have ended.

    Args:
        committed: the newest committed step; the other arguments are those of `conclude`.
    """
    directory = stage.directory
    end = JobEnd(code, most_without_progress, done=stage.done() is not None)
    if end.done:
        return replace(end, off_track=_complaint(lambda: refuse_off_track(stage)))
    owner = stage.attempts.owner()
    own = owner is not None and (owner["job"], owner["restart_count"]) == (job, _restarts())
    if owner is not None and not own and _is_of_a_later_start(owner, directory, job):
        return replace(end, overtaken=f"attempt {owner['attempt']} on {owner['host']}")
    # What another start recorded says nothing about this one.
    outcome = stage.attempts.last_outcome() if own else None
    errors = stage.attempts.device_errors() if own else []
    if errors and errors[-1].attempt != owner["attempt"]:
        errors = []
    bad = bad_nodes(directory, job, _restarts())
    return replace(
        end,
        cancelled=(directory.parent / CANCELLED_FILE).exists(),
        held=_complaint(stage.attempts.check_free) if code == SrunCode.PERMANENT else "",
        recorded=" ".join(outcome.reason.split()) if outcome else "",
        bad_nodes=bad or None,
        every_node_is_bad=bool(bad) and _every_node_is_bad(directory, job),
        program_fault=program_at_fault(errors) or "" if errors else "",
        suspect=returning_node(errors) if errors else None,
        committed=committed,
        starts=steps_at_starts(read_job_history(directory)),
    )


def _complaint(check: Callable[[], object]) -> str:
    """What a check refuses; "" if nothing."""
    try:
        check()
    except (OffTrackError, StageError) as error:
        return str(error)
    return ""


def _every_node_is_bad(directory: Path, job: str) -> bool:
    return every_node_is_bad(directory, job, _restarts(), stored_site(directory.parent, directory.name).nodes)


def retry(directory: Path, job: str, end: JobEnd, reason: str) -> int:
    """Requeue the job, without the nodes that it found bad; the exit code of the job."""
    found = [set(bad_nodes(directory, job, start)) for start in range(_restarts(), -1, -1)]
    if end.suspect:
        found[0] |= {end.suspect}
        reason += f"; it came back to {end.suspect}, so the next start tries another node"
    known, excluded, site = set().union(*found), set(), stored_site(directory.parent, directory.name)
    if known and not end.every_node_is_bad:
        excluded = _until_answered(lambda: choose_exclusion(found, partial(_can_do_without, directory, site)))
        if kept := sorted(known - excluded):
            reason += f"; {', '.join(kept)} may be used again: too few nodes are left otherwise"
    print(f"stage {directory.name}: {reason}; it is retried: Slurm is asked to requeue job {job}", flush=True)
    note_job_event(directory, "requeued", job, committed=end.committed, code=end.code, reason=reason)
    try:
        _until_answered(lambda: client.requeue_job(job))
    except LaunchError as error:
        # Somebody else requeued or cancelled the job in this moment, so the decision is no longer ours.
        print(error, flush=True)
        note_job_event(directory, "stopped", job, reason=str(error))
        return 1
    if known or _restarts():  # a suspect was left out for one start alone
        try:
            _until_answered(lambda: client.exclude_nodes(job, {*excluded, *site.exclude}))
        except LaunchError as error:  # as for a node that is no longer in the cluster; the job is requeued all the same
            print(error, flush=True)
    return 0


def _until_answered(ask: Callable[[], T]) -> T:
    """Slurm's answer, however long slurmctld is away."""
    while True:
        try:
            return ask()
        except client.NoControllerError as error:
            print(error, flush=True)
            time.sleep(ASK_AGAIN_SECONDS)


def _can_do_without(directory: Path, site: Site, nodes: Collection[str]) -> bool:
    """Whether, by Slurm's own test, enough other nodes are up and have what the site asks for.

    Raises:
        NoControllerError: if slurmctld does not answer.
    """
    try:
        without = site.model_copy(update={"exclude": tuple(sorted({*site.exclude, *nodes}))})
        # A warning says that the job would wait for nodes that are out of service.
        return not JobScript(directory, without, Path(__file__).parents[2]).test()
    except client.NoControllerError:
        raise
    except LaunchError as error:
        # Any other refusal, such as that this node may not submit, says nothing about the nodes.
        return not any(words in str(error) for words in client.NO_SUCH_NODES)


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _is_of_a_later_start(attempt: Mapping[str, Any], directory: Path, job: str) -> bool:
    """Whether a start of this job after this one made an attempt, or a job that was submitted later. Numbers decide,
    because the clocks of two machines differ, and one clock may be set back."""
    if not str(attempt["job"]).isdigit() or not job.isdigit():
        return False  # a local run, which is refused while a job of the stage is queued, or no readable entry
    known = [e.get("attempt") for e in read_job_history(directory) if e.get("job") == job]
    if str(attempt["job"]) != job and known and is_count(known[-1]) and attempt["attempt"] <= known[-1]:
        return False  # made before this job; on another cluster its job may have had a higher number
    return (int(attempt["job"]), attempt["restart_count"]) > (int(job), _restarts())


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
    run = directory.parent
    stages = load_recipe(run / RECIPE_FILE).stages
    dependents = dependent_stages({name: recipe.previous for name, recipe in stages.items()}, directory.name)
    for job in client.query_jobs([run / name for name in dependents]) if dependents else []:
        if job.live:
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason=reason)


def main() -> int:
    # A requeue sends SIGTERM to all processes of the job, which would end scontrol before its answer has come.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    redact_tracebacks()
    directory, code, most_without_progress = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for tries_left in range(TRIES - 1, -1, -1):
        try:
            return conclude(Stage(directory), code, os.environ["SLURM_JOB_ID"], most_without_progress)
        except UserError as error:
            print(error, flush=True)
            break
        except OSError as error:  # the file system of the run is full, over a quota, or away
            if tries_left and is_unanswered(error):
                time.sleep(ASK_AGAIN_SECONDS)
                continue
            remedy = f"mend that, then `fcmae resume {directory.parent}`"
            print(f"stage {directory.name} is not retried: {error}; {remedy}", flush=True)
            break
    return 1


if __name__ == "__main__":
    sys.exit(main())
