"""Submit a chain: find out which stages need a job, check them, and submit exactly those.

DONE markers say what is finished and squeue says what is queued or runs; neither our own records nor Slurm's memory of
ended jobs is asked. So the same steps serve a first submission, one after the login node died, and another site.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.chain import check_data, check_weights, open_chain
from cluster.site import Site, check_stage_names, store_site
from cluster.slurm import client
from cluster.slurm.client import Job, JobState
from cluster.slurm.code_snapshot import take_code_snapshot
from cluster.slurm.gpu_memory_check import MemoryNeed, check_gpu_memory
from cluster.slurm.job_history import note_job_event, slurm_directory
from cluster.slurm.retry import committed_step
from cluster.slurm.script import JobScript
from cluster.slurm.time_limit import CANCELLED_FILE, StopTime
from pipeline.errors import LaunchError
from pipeline.health.verdict import refuse_off_track
from pipeline.recipe import ChainRecipe, StageRecipe
from pipeline.stage.directory import Stage, read_done
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.tracking.journal import read_events

ENDING_SECONDS = 75.0  # how long a job may take to end: Slurm's KillWait is 30 by default, and epilogs take their time
ASK_AGAIN_SECONDS = 2.0


@dataclass(frozen=True)
class PlannedStage:
    """A stage that is done, or has the live job `job`, or needs a job."""

    name: str
    directory: Path
    recipe: StageRecipe
    site: Site
    done: bool = False
    job: Job | None = None
    replaces: Job | None = None
    """A live job to cancel: it waits for a job that is gone, or Slurm will never start it."""

    @property
    def needs_job(self) -> bool:
        return not self.done and self.job is None


def plan_jobs(
    chain: ChainRecipe, run: Path, site: Site, *, ask_slurm: bool = True, start: str | None = None
) -> list[PlannedStage]:
    """Find out which stages of a chain need a job. Wait for jobs that are just ending, and say so.

    Args:
        start: the first stage to submit; stages before it that need a job are left out.

    Raises:
        RecipeError: if the site names a stage that there is not.
        LaunchError: if Slurm cannot be asked, a job does not end, there is no stage `start`, or the stage before it is
            neither done nor queued.
    """
    if start is not None and start not in chain.stages:
        raise LaunchError(f"there is no stage {start} in recipe {chain.name}; it has {', '.join(chain.stages)}")
    check_stage_names(site, chain.stages)
    jobs = _settled_jobs(run, list(chain.stages)) if ask_slurm else {}
    planned: dict[str, PlannedStage] = {}
    started = start is None
    for name, recipe in chain.stages.items():
        started = started or name == start
        before = planned.get(recipe.previous or "")
        job, replaces = jobs.get(name), None
        if job and (job.reason in client.NEVER_STARTS or _waits_for_another(job, before)):
            job, replaces = None, job
        done = read_done(run / name) is not None
        stage = PlannedStage(name, run / name, recipe, site.for_stage(name), done, job, replaces)
        if stage.needs_job and not started:
            continue
        if stage.needs_job and recipe.previous and before is None:
            raise LaunchError(
                f"stage {name} starts from {recipe.previous}, which is neither done nor queued; leave --from out"
            )
        planned[name] = stage
    return list(planned.values())


def _waits_for_another(job: Job, before: PlannedStage | None) -> bool:
    """Whether a job waits for something else than the job of the stage before."""
    return before is not None and not before.done and job.after != (before.job.id if before.job else None)


def live_jobs(run: Path, stages: list[str]) -> dict[str, Job]:
    """The newest job of each stage that waits or runs, by stage. Jobs are found by their directory, because records of
    ours may be lost or stale."""
    jobs = client.query_jobs(stages=stages)
    return {job.directory.name: job for job in jobs if job.live and job.directory.parent == run}


def _settled_jobs(run: Path, stages: list[str]) -> dict[str, Job]:
    """The live jobs, once no job is just ending. A cancelled job that still saves looks alive, but Slurm would cancel
    what depends on it; a job that is being requeued looks the same."""
    deadline, announced = time.monotonic() + ENDING_SECONDS, ""
    while True:
        jobs = live_jobs(run, stages)
        ending = [
            f"job {job.id} of stage {name}"
            for name, job in jobs.items()
            if job.state is JobState.ENDING and not (run / name / DONE_FILE).exists()
        ]
        if not ending:
            return jobs
        if time.monotonic() >= deadline:
            raise LaunchError(f"{ending[0]} is just ending; try again in a minute, nothing has been changed")
        if ending[0] != announced:
            announced = ending[0]
            print(f"waiting for {announced}, which is just ending, for up to {ENDING_SECONDS:.0f} s", flush=True)
        time.sleep(ASK_AGAIN_SECONDS)


def check_planned(planned: list[PlannedStage]) -> dict[str, MemoryNeed]:
    """Refuse what can be refused without Slurm, such as a stage that is done but off track.

    Returns:
        The estimated memory of each stage that needs a job, where the site describes its GPUs.

    Raises:
        UserError: for the first defect.
    """
    classes: dict[str, set[str]] = {}
    for stage in planned:
        if stage.done:
            refuse_off_track(Stage(stage.directory), stage.recipe)
        elif stage.needs_job:
            _check_stage(stage, classes)
    # Last, because it takes longest.
    needs = {stage.name: check_gpu_memory(stage.recipe, stage.site) for stage in planned if stage.needs_job}
    return {name: need for name, need in needs.items() if need}


def _check_stage(planned: PlannedStage, classes: dict[str, set[str]]) -> None:
    planned.recipe.check_world_size(planned.site.ranks)
    check_weights(planned.recipe, planned.directory)
    data = check_data(planned.recipe, classes)
    if (planned.directory / RECIPE_FILE).exists():
        stage = Stage(planned.directory)
        stage.attempts.check_free()
        if (planned.directory / DATA_FILE).exists():
            stage.pin_data({name: beton.sha256 for name, beton in data.items()})
    stop_time, limit = StopTime(), planned.site.time_limit_minutes
    for event in read_events(planned.directory / JOURNAL_FILE):
        stop_time.add(event)
    if stop_time.seconds() >= limit * 60:
        raise LaunchError(
            f"stage {planned.name}: time_limit_minutes {limit} is too short, for its steps and saves take"
            f" {stop_time.seconds():.0f} s to stop; raise it"
        )


def check_with_slurm(planned: list[PlannedStage], code: Path) -> None:
    """Refuse what only Slurm can refuse: partition, limits, nodes. Print a warning for a job that may have to wait.

    Raises:
        LaunchError: for the first defect.
    """
    for stage in planned:
        if stage.needs_job:
            check_partition(stage)
            if warning := JobScript(stage.directory, stage.site, code).test():
                print(warning)


def check_partition(planned: PlannedStage) -> None:
    """Refuse a partition that does not exist, or whose limits would never let the job start. Of several partitions one
    must fit.

    Raises:
        LaunchError: with the defect of the first partition.
    """
    defects = []
    for name in planned.site.partition.split(",") if planned.site.partition else [None]:
        partition = client.partition_fields(name)
        if partition is None:
            remedy = "see `sinfo` for those there are" if name else "name one, there is no default here"
            raise LaunchError(f"stage {planned.name}: there is no partition {name}; {remedy}")
        defects.append(_defect(planned, partition))
    if all(defects):
        raise LaunchError(f"stage {planned.name}: {defects[0]}")


def _defect(planned: PlannedStage, partition: dict[str, str]) -> str:
    """Why a job would wait for ever in a partition: Slurm accepts such jobs unless it is configured to refuse them."""
    name, minutes = partition["PartitionName"], planned.site.time_limit_minutes
    limit = client.parse_minutes(partition.get("MaxTime", ""))
    if minutes > limit:
        return (
            f"time_limit_minutes {minutes} exceeds the {limit:.0f} of partition {name}; lower it, a stage resumes in as"
            " many runs as it needs"
        )
    if partition.get("State", "UP") != "UP":
        return f"partition {name} is {partition['State']}; use another"
    return ""


def job_scripts(planned: list[PlannedStage], code: Path) -> list[str]:
    """The job script of each stage that needs a job, with JOB-OF-STAGE for the ids of jobs that do not exist yet."""
    stages = [stage for stage in planned if stage.needs_job]
    ids = {stage.name: f"JOB-OF-{stage.name}" for stage in stages}
    return [JobScript(s.directory, s.site, code, ids.get(s.recipe.previous or "")).text() for s in stages]


def submit_planned(
    chain: ChainRecipe,
    run: Path,
    site: Site,
    planned: list[PlannedStage],
    report: Callable[[str], None],
    code: Path | None = None,
) -> dict[str, str]:
    """Make or reopen the run directory and submit the stages that need a job.

    Args:
        report: gets a sentence per job.
        code: the code snapshot that the jobs run, if several runs share one; by default one is taken beside the run.

    Returns:
        The job id of each stage that has a job.

    Raises:
        UserError: if the directory belongs to another recipe, cannot be written, or Slurm refuses a job. Jobs that were
            submitted before stay queued; the same command submits the rest.
    """
    open_chain(chain, run, bound=any(stage.job for stage in planned))
    store_site(site, run)
    (run / CANCELLED_FILE).unlink(missing_ok=True)
    code = code or take_code_snapshot(run)
    ids = {stage.name: stage.job.id for stage in planned if stage.job}
    for stage in (stage for stage in planned if stage.needs_job):
        directory, site, after = stage.directory, stage.site, ids.get(stage.recipe.previous or "")
        if stage.replaces:
            client.cancel_job(stage.replaces.id)
            note_job_event(directory, "cancelled", stage.replaces.id, reason="another takes its place")
        store_site(site, slurm_directory(directory))
        id = ids[stage.name] = JobScript(directory, site, code, after).submit()
        facts = {"nodes": site.nodes, "ranks": site.ranks, "after": after, "code": code.name}
        note_job_event(directory, "submitted", id, committed=committed_step(directory), **facts)
        report(f"{stage.name}: job {id}" + (f", after job {after}" if after else ""))
    return ids


def cancel_jobs(run: Path, stages: list[str]) -> list[str]:
    """Cancel the jobs of a run; a sentence per job. A file in the run directory also stops the jobs that Slurm cannot
    be asked about now."""
    (run / CANCELLED_FILE).write_text("by `fcmae cancel`; `fcmae resume` removes this file\n")
    try:
        live = live_jobs(run, stages)
        # The last stage first, so that no job starts because the one before it has ended.
        for job in reversed(live.values()):
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason="by `fcmae cancel`")
    except client.NoControllerError as error:
        return [
            f"{error}; until then running stages save and stop within seconds, and stages that start later stop at once"
        ]
    sentences = [f"{name}: job {job.id} is cancelled ({job.state} until now)" for name, job in live.items()]
    return sentences or ["no job of this run waits or runs"]
