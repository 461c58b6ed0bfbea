"""From a recipe and a site to jobs: what is missing is found out, checked, and submitted, and nothing else.

DONE markers say what is finished, squeue says what is on its way; neither files of ours nor Slurm's memory of ended
jobs is asked. So the same steps serve a first submission, one after the login node died, and one on another site.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.chain import check_data, check_weights, open_chain
from cluster.site import Site, store_site
from cluster.slurm import client
from cluster.slurm.client import Job, JobState
from cluster.slurm.code_snapshot import take_code_snapshot
from cluster.slurm.gpu_memory_check import Needed, check_memory
from cluster.slurm.job_history import note_job_event, slurm_directory
from cluster.slurm.retry import committed_step
from cluster.slurm.script import JobScript, job_name
from cluster.slurm.time_limit import CANCELLED, Pace
from pipeline.errors import LaunchError
from pipeline.health.verdict import refuse_off_track
from pipeline.recipe import ChainRecipe, StageRecipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.tracking.journal import Tail

ENDING_SECONDS = 75.0  # how long a job may take to end: Slurm's KillWait is 30 by default, and epilogs take their time
ASK_SECONDS = 2.0


@dataclass(frozen=True)
class PlannedStage:
    """What becomes of one stage: finished, on its way as `job`, or to be submitted."""

    name: str
    directory: Path
    recipe: StageRecipe
    site: Site
    done: bool = False
    job: Job | None = None
    replaces: Job | None = None
    """A job that waits for one which is gone, or that Slurm will not start any more."""

    @property
    def missing(self) -> bool:
        return not self.done and self.job is None


def plan_jobs(
    chain: ChainRecipe, run: Path, site: Site, *, ask_slurm: bool = True, start: str | None = None
) -> list[PlannedStage]:
    """What becomes of the stages of a chain, in order, those before `start` left out unless others need them. Waits for
    jobs that are just ending, and says so.

    Raises:
        LaunchError: if Slurm cannot be asked, a job does not end, there is no stage `start`, or what it starts from is
            neither done nor on its way.
    """
    if start is not None and start not in chain.stages:
        raise LaunchError(f"there is no stage {start} in recipe {chain.name}; it has {', '.join(chain.stages)}")
    jobs = _settled_jobs(run, list(chain.stages)) if ask_slurm else {}
    found: dict[str, PlannedStage] = {}
    begun = start is None
    for name, recipe in chain.stages.items():
        begun = begun or name == start
        directory, before = run / name, found.get(recipe.previous or "")
        job, replaces = jobs.get(name), None
        if job and job.reason in client.NEVER_STARTS:
            job, replaces = None, job
        if job and before and not before.done and job.after != (before.job.id if before.job else None):
            job, replaces = None, job
        item = PlannedStage(
            name, directory, recipe, site.for_stage(name), (directory / DONE_FILE).exists(), job, replaces
        )
        if item.missing and not begun:
            continue
        if item.missing and recipe.previous and before is None:
            raise LaunchError(
                f"stage {name} starts from {recipe.previous}, which is neither done nor queued; leave --from out"
            )
        found[name] = item
    return list(found.values())


def live_jobs(run: Path, stages: list[str]) -> dict[str, Job]:
    """stage -> its newest job that waits or runs, found by its directory: no record of ours can be lost or stale."""
    found = client.query_jobs(names=[job_name(run / name) for name in stages])
    return {job.directory.name: job for job in found if job.live and job.directory.parent == run}


def _settled_jobs(run: Path, stages: list[str]) -> dict[str, Job]:
    """The live jobs, once it shows what becomes of those that are just ending: one that was cancelled and still saves
    is not on its way, and what would wait for it Slurm would cancel; one that is requeued is."""
    give_up_at, told = time.monotonic() + ENDING_SECONDS, ""
    while True:
        jobs = live_jobs(run, stages)
        ending = [f"job {job.id} of stage {name}" for name, job in jobs.items()
                  if job.state is JobState.ENDING and not (run / name / DONE_FILE).exists()]  # fmt: skip
        if not ending:
            return jobs
        if time.monotonic() >= give_up_at:
            raise LaunchError(f"{ending[0]} is just ending; try again in a minute, nothing has been changed")
        if ending[0] != told:
            told = ending[0]
            print(f"waiting for {told}, which is just ending, for up to {ENDING_SECONDS:.0f} s", flush=True)
        time.sleep(ASK_SECONDS)


def check_planned(planned: list[PlannedStage]) -> dict[str, Needed]:
    """Everything that can be refused before queueing: what is done and off track, where the recipe wants to stop, too.

    Returns: stage -> the memory that it is estimated to need, where the site says what its GPUs have.

    Raises:
        UserError: the first one found.
    """
    classes: dict[str, set[str]] = {}
    for item in planned:
        if item.done:
            refuse_off_track(Stage(item.directory), item.recipe)
        if item.missing:
            item.recipe.check_world_size(item.site.ranks)
            check_weights(item.recipe, item.directory)
            data = check_data(item.recipe, classes)
            if (item.directory / RECIPE_FILE).exists():
                stage = Stage(item.directory)
                stage.attempts.check_free()
                if (item.directory / DATA_FILE).exists():
                    stage.pin_data({name: beton.sha256 for name, beton in data.items()})
            _check_time(item)
    needed = {item.name: check_memory(item.recipe, item.site) for item in planned if item.missing}  # takes longest
    return {name: found for name, found in needed.items() if found}


def check_with_slurm(planned: list[PlannedStage], code: Path) -> None:
    """What only Slurm can refuse: partition, limits, nodes. What may have to wait is said.

    Raises:
        LaunchError: the first one found.
    """
    for item in planned:
        if item.missing:
            check_partition(item)
            if warning := JobScript(item.directory, item.site, code).test():
                print(warning)


def job_scripts(planned: list[PlannedStage], code: Path) -> list[str]:
    """The job script of each stage to submit, to the letter but for the ids of jobs that are not there yet."""
    queued = {item.name for item in planned if item.missing}
    after = {item.name: f"JOB-OF-{item.recipe.previous}" for item in planned if item.recipe.previous in queued}
    return [JobScript(item.directory, item.site, code, after.get(item.name)).text() for item in planned if item.missing]


def _check_time(item: PlannedStage) -> None:
    pace = Pace()
    for event in Tail(item.directory / JOURNAL_FILE).poll():
        pace.take(event)
    limit = item.site.time_limit_minutes
    if pace.stop_seconds() >= limit * 60:
        raise LaunchError(
            f"stage {item.name}: time_limit_minutes {limit} is too short, for its steps and saves take"
            f" {pace.stop_seconds():.0f} s to stop; raise it"
        )


def check_partition(item: PlannedStage) -> None:
    """Refuse a partition that is not there or, of several, limits by which none would ever start the job.

    Raises:
        LaunchError: with what the first one is refused for.
    """
    refused = []
    for name in item.site.partition.split(",") if item.site.partition else [None]:
        partition = client.partition_fields(name)
        if partition is None:
            remedy = "see `sinfo` for those there are" if name else "name one, there is no default here"
            raise LaunchError(f"stage {item.name}: there is no partition {name}; {remedy}")
        refused.append(_refusal(item, partition))
    if all(refused):
        raise LaunchError(f"stage {item.name}: {refused[0]}")


def _refusal(item: PlannedStage, partition: dict[str, str]) -> str:
    # Slurm accepts these and lets them wait for ever, unless the cluster is configured to refuse.
    name, asked = partition["PartitionName"], item.site.time_limit_minutes
    limit = client.parse_minutes(partition.get("MaxTime", ""))
    if asked > limit:
        return (
            f"time_limit_minutes {asked} exceeds the {limit:.0f} of partition {name}; lower it, stages go on in as many"
            " runs as they need"
        )
    if partition.get("State", "UP") != "UP":
        return f"partition {name} is {partition['State']}; use another"
    return ""


def submit_planned(
    chain: ChainRecipe,
    run: Path,
    site: Site,
    planned: list[PlannedStage],
    report: Callable[[str], None],
    code: Path | None = None,
) -> dict[str, str]:
    """Make or reopen the run directory and submit what is missing; stage -> job id. `report` gets a sentence a job.

    code: the snapshot that the jobs run, if several runs share one; by default one is taken beside the run.

    Raises:
        UserError: if the directory belongs to another recipe, cannot be written, or Slurm refuses a job. What was
            submitted before stays so, and the same command goes on from there.
    """
    open_chain(chain, run)
    store_site(site, run)
    (run / CANCELLED).unlink(missing_ok=True)
    code = code or take_code_snapshot(run)
    ids = {item.name: item.job.id for item in planned if item.job}
    for item in planned:
        if not item.missing:
            continue
        if item.replaces:
            client.cancel_job(item.replaces.id)
            note_job_event(item.directory, "cancelled", item.replaces.id, reason="another takes its place")
        before = item.recipe.previous
        after = ids.get(before) if before else None
        store_site(item.site, slurm_directory(item.directory))
        id = ids[item.name] = JobScript(item.directory, item.site, code, after).submit()
        note_job_event(
            item.directory,
            "submitted",
            id,
            committed=committed_step(item.directory),
            nodes=item.site.nodes,
            ranks=item.site.ranks,
            after=after,
            code=code.name,
        )
        report(f"{item.name}: job {id}" + (f", after job {after}" if after else ""))
    return ids


def cancel_jobs(run: Path, stages: list[str]) -> list[str]:
    """Cancel the jobs of a run; a sentence each. A file tells those that Slurm cannot be asked about just now."""
    (run / CANCELLED).write_text("by `fcmae cancel`; `fcmae resume` removes this file\n")
    try:
        live = live_jobs(run, stages)
        # The last first, so that none starts because the one before it has ended.
        for job in reversed(live.values()):
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason="by `fcmae cancel`")
    except client.NoControllerError as error:
        return [f"{error}; until then running stages save and stop within seconds, and none that starts later goes on"]
    said = [f"{name}: job {job.id} is cancelled ({job.state} until now)" for name, job in live.items()]
    return said or ["no job of this run waits or runs"]
