"""Let one command at a time submit jobs of a run, also from two machines and after a command died. Slurm decides alone:
there is no clock and no lock file.

The first job of a submission is its *ticket*. It is queued held, under a name that only tickets have. The lowest number
wins: a command that finds an older ticket, or another job of a stage that it wanted to submit, cancels its own. The
winner submits the other jobs, which wait for the ticket, and then releases it. That fails if somebody has cancelled the
ticket meanwhile, and then the command cancels all that it has submitted. So a command that slept may wake any time.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cluster.slurm import client
from cluster.slurm.client import Job
from cluster.slurm.job_history import note_job_event, slurm_directory
from cluster.slurm.script import JobScript
from pipeline.errors import LaunchError

SILENT_SECONDS = 30.0  # a command that has submitted nothing for so long has died, or will find its ticket cancelled
ASK_AGAIN_SECONDS = 2.0
RELEASE_TRIES = 30


class SubmissionLostError(LaunchError):
    """Another command submits jobs of this run, or has cancelled those of this command. Of these none is queued.

    Attributes:
        cancelled: whether they were cancelled, as by `fcmae cancel`.
    """

    def __init__(self, sentence: str, *, cancelled: bool = False) -> None:
        super().__init__(sentence)
        self.cancelled = cancelled


def jobs_without_tickets(stages: Sequence[Path]) -> list[Job]:
    """The live jobs of these stage directories, the oldest first, once no other command is submitting some. Cancel the
    ticket of a command that died, and say so: the jobs that it has submitted can never start.

    Raises:
        LaunchError: if Slurm does not answer or refuses.
    """
    seen: list[str] | None = None
    changed = 0.0
    while True:
        jobs = [job for job in client.query_jobs(stages) if job.live]
        tickets = [job for job in jobs if job.is_ticket]
        if not tickets:
            return jobs
        ids = [job.id for job in jobs]
        if seen is None:
            print(f"waiting for another command, which is just submitting {_listed(tickets)}", flush=True)
        if ids != seen:
            seen, changed = ids, time.monotonic()
        elif time.monotonic() - changed > SILENT_SECONDS:
            for job in tickets:
                client.cancel_job(job.id)
                note_job_event(job.directory, "cancelled", job.id, reason="its submission was never finished")
            print(f"{_listed(tickets)} was left by a command that died; it is cancelled", flush=True)
            return [job for job in jobs if not job.is_ticket]
        time.sleep(ASK_AGAIN_SECONDS)


@contextmanager
def ticket(
    script: JobScript, chain: Collection[Path], needed: Collection[Path], replaced: Collection[str]
) -> Iterator[dict[Path, str]]:
    """Submit a job as the ticket of a submission, and release it after the block, which submits the other jobs.

    Args:
        chain: the directories of the run's stages; `needed`, of those that the submission is for.
        replaced: ids of live jobs of these stages that the submission replaces.

    Yields:
        The id of the job of each stage directory that was submitted so far. The block adds its own.

    Raises:
        SubmissionLostError: if another command was first, or has cancelled the ticket meanwhile. If the block raises
            it, the ticket is cancelled; after any other error of the block its jobs stay queued.
    """
    id = script.submit(ticket=True)
    submitted = {script.stage_directory: id}
    try:
        _refuse_rivals(id, chain, needed, replaced)
    except LaunchError as error:
        _withdraw(submitted, str(error))
        raise
    try:
        try:
            yield submitted
        except SubmissionLostError:
            raise
        except BaseException:
            _release(script, id)
            raise
        _release(script, id)
    except SubmissionLostError as lost:
        _withdraw(submitted, str(lost))
        raise


def _refuse_rivals(own: str, chain: Collection[Path], needed: Collection[Path], replaced: Collection[str]) -> None:
    for job in client.query_jobs(chain):
        rival = job.is_ticket or (job.live and job.directory in needed and job.id not in replaced)
        if rival and int(job.id) < int(own):
            raise SubmissionLostError(
                f"another command, on {client.submitting_host(job.id)}, was first with job {job.id} of stage"
                f" {job.directory.name}; job {own} of this command is cancelled"
            )


def _release(script: JobScript, id: str) -> None:
    wait = script.site.sbatch.get("hold")  # the site's jobs wait until a person releases them
    try:
        if not wait:
            _patiently(lambda: client.release_job(id))
        with nullcontext() if wait else suppress(LaunchError):  # a released job may have ended already
            client.rename_job(id, client.job_name(script.stage_directory))
    except client.CommandError:
        raise SubmissionLostError(
            f"job {id} was cancelled while this command submitted the jobs after it, so these are cancelled too;"
            " `fcmae resume` submits them anew",
            cancelled=True,
        ) from None


def _patiently(ask: Callable[[], None]) -> None:
    """Ask Slurm again for a minute while slurmctld does not answer: all jobs of the submission wait for this."""
    for _ in range(RELEASE_TRIES - 1):
        try:
            return ask()
        except client.NoControllerError:
            time.sleep(ASK_AGAIN_SECONDS)
    return ask()


def _withdraw(submitted: dict[Path, str], reason: str) -> None:
    """Cancel the jobs of a submission that lost. Without slurmctld the next command does it."""
    for directory, id in reversed(submitted.items()):
        with suppress(client.NoControllerError):
            client.cancel_job(id)
        for path in slurm_directory(directory).glob(f"{id}_sub*"):  # script and pickle
            path.unlink(missing_ok=True)
        if len(submitted) > 1:
            note_job_event(directory, "cancelled", id, reason=reason)


def _listed(jobs: Sequence[Job]) -> str:
    return ", ".join(f"job {job.id} of stage {job.directory.name}" for job in jobs)
