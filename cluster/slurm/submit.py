"""Submit a chain: find out which stages need a job, check them, and submit exactly those.

DONE markers say what is finished and squeue says what is queued or runs; neither our own records nor Slurm's memory of
ended jobs is asked. So the same steps serve a first submission, one after the login node died, and another site. Of
several commands at once one submits (`cluster.slurm.ticket`).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.chain import (
    check_data,
    check_handoffs,
    check_run_directory,
    check_weights,
    hold_run,
    open_chain,
    refuse_unwritable,
    resolve_chain_paths,
    resolve_paths,
)
from cluster.site import SITE_FILE, Site, check_stage_names, store_site, stored_site
from cluster.slurm import client
from cluster.slurm.client import Job, JobState
from cluster.slurm.code_snapshot import take_code_snapshot
from cluster.slurm.gpu_memory_check import MemoryNeed, check_gpu_memory
from cluster.slurm.job_history import note_job_event, slurm_directory
from cluster.slurm.retry import committed_step
from cluster.slurm.script import JobScript
from cluster.slurm.ticket import SubmissionLostError, jobs_without_tickets, ticket
from cluster.slurm.time_limit import CANCELLED_FILE, StopTime
from pipeline.errors import LaunchError, RecipeError
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
    replaces: tuple[Job, ...] = ()
    """Live jobs to cancel: they wait for a job that is gone, or Slurm will never start them."""

    @property
    def needs_job(self) -> bool:
        return not self.done and self.job is None


def plan_jobs(
    chain: ChainRecipe, run: Path, site: Site, *, ask_slurm: bool = True, start: str | None = None
) -> list[PlannedStage]:
    """Find out which stages of a chain need a job. Wait for jobs that are just ending or being submitted, and say so.
    A stage that the run shares with another one has its directory, and so its job, there.

    Args:
        start: the first stage to submit; stages before it that need a job are left out.

    Raises:
        RecipeError: if the site names a stage that there is not.
        LaunchError: if Slurm cannot be asked, a job does not end, there is no stage `start`, or the stage before it is
            neither done nor queued.
    """
    if start is not None and start not in chain.stages:
        raise LaunchError(f"there is no stage {start} in recipe {chain.name}; it has {', '.join(chain.stages)}")
    if not (run / SITE_FILE).exists() or site != stored_site(run):  # which was checked when it was submitted
        check_stage_names(site, chain.stages)
    jobs = _settled_jobs(run, list(chain.stages)) if ask_slurm else {}
    planned: dict[str, PlannedStage] = {}
    started = start is None
    for name, recipe in chain.stages.items():
        started = started or name == start
        before = planned.get(recipe.previous or "")
        live = tuple(jobs.get(name, ()))
        job, replaces = live[-1] if live else None, ()
        if job and (job.reason in client.NEVER_STARTS or _waits_for_another(job, before)):
            job, replaces = None, live
        directory = (run / name).resolve()
        done = read_done(directory) is not None
        stage = PlannedStage(name, directory, recipe, site.for_stage(name), done, job, replaces)
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


def live_jobs(run: Path, stages: list[str]) -> list[Job]:
    """The jobs of a run that wait or run, the oldest first. Jobs are found by name and directory, because records of
    ours may be lost or stale."""
    if not stages:
        return []  # without names Slurm would list everybody's jobs
    return [job for job in client.query_jobs([(run / name).resolve() for name in stages]) if job.live]


def _settled_jobs(run: Path, stages: list[str]) -> dict[str, list[Job]]:
    """The live jobs of each stage, once no job is just ending or being submitted. A cancelled job that still saves
    looks alive, but Slurm would cancel what depends on it; a job that is being requeued looks the same."""
    deadline, announced = time.monotonic() + ENDING_SECONDS, ""
    while True:
        jobs = jobs_without_tickets([(run / name).resolve() for name in stages])
        ending = [
            f"job {job.id} of stage {job.directory.name}"
            for job in jobs
            if job.state is JobState.ENDING and not (job.directory / DONE_FILE).exists()
        ]
        if not ending:
            return {name: of_stage for name in stages if (of_stage := [j for j in jobs if j.directory.name == name])}
        if time.monotonic() >= deadline:
            raise LaunchError(
                f"{ending[0]} is just ending; try again in a minute, nothing has been changed (if Slurm calls it"
                " COMPLETING for long, a node cannot end its processes: tell the administrators)"
            )
        if ending[0] != announced:
            announced = ending[0]
            print(f"waiting for {announced}, which is just ending, for up to {ENDING_SECONDS:.0f} s", flush=True)
        time.sleep(ASK_AGAIN_SECONDS)


def check_without_data(chain: ChainRecipe, run: Path, site: Site, code: Path, start: str | None = None) -> None:
    """Refuse what needs no data to be refused, before its images are prepared for hours.

    Args:
        code: as of `check_with_slurm`.
        start: as of `plan_jobs`.

    Raises:
        UserError: for the first defect.
    """
    check_run_directory(resolve_chain_paths(chain), run)
    refuse_unwritable(run)
    planned = plan_jobs(chain, run, site, start=start)
    for stage in planned:
        if stage.needs_job:
            stage.recipe.check_world_size(stage.site.ranks)
            check_weights(resolve_paths(stage.recipe), stage.directory)
    check_handoffs({stage.name: stage.recipe for stage in planned if not stage.done})
    check_with_slurm(planned, code)


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
    check_handoffs({stage.name: stage.recipe for stage in planned if not stage.done})
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
            stage.pin_data({name: beton.identity for name, beton in data.items()})
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
    after: str | None = None,
) -> dict[str, str]:
    """Make or reopen the run directory and submit the stages that need a job.

    Args:
        report: gets a sentence per job.
        code: the code snapshot that the jobs run, if several runs share one; by default one is taken beside the run.
        after: id of a job of another run that the first of these jobs waits for too.

    Returns:
        The job id of each stage that has a job.

    Raises:
        SubmissionLostError: if another command submits jobs of this run at the same moment, or cancels them; nothing of
            this call is queued then. Plan anew.
        UserError: if the directory belongs to another recipe, was removed, cannot be written, or Slurm refuses a job.
            Jobs that were submitted before stay queued; the same command submits the rest.
    """
    own = [stage.job for stage in planned if stage.job and stage.directory.parent == run]
    if own and not (run / RECIPE_FILE).exists():
        ids = " ".join(job.id for job in own)
        raise LaunchError(
            f"{run} was removed while jobs of it were queued, which would find neither their code nor their stage;"
            f" cancel them (`scancel {ids}`), then submit again"
        )
    open_chain(chain, run, bound=any(stage.job for stage in planned))
    needed = [stage for stage in planned if stage.needs_job]
    ids = {stage.name: stage.job.id for stage in planned if stage.job}
    if not needed:
        store_site(site, run)
        (run / CANCELLED_FILE).unlink(missing_ok=True)
        return ids
    if not (run / SITE_FILE).exists():
        store_site(site, run)  # for `fcmae resume`, should this command die
    folder = code or take_code_snapshot(run)  # before the ticket, whose script holds its hash
    first, replaced = needed[0], [job for stage in needed for job in stage.replaces]
    # Both: the stage before may be one that another run trains, and `after` is a rung of a ladder.
    before = ":".join(filter(None, (ids.get(first.recipe.previous or ""), after))) or None
    script = JobScript(first.directory, first.site, folder, before)
    chain_of, own = [stage.directory for stage in planned], [stage.directory for stage in needed]
    with hold_run(run), ticket(script, chain_of, own, [job.id for job in replaced]) as submitted:
        ids[first.name] = submitted[first.directory]
        _refuse_another_recipe(chain, run)
        store_site(site, run)
        # Not before the ticket is in the queue, where `fcmae cancel` finds it: a cancel in between would be forgotten.
        for owner in {run, *(stage.directory.parent for stage in needed)}:
            (owner / CANCELLED_FILE).unlink(missing_ok=True)
        for job in replaced:
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason="another takes its place")
        # After that line, from which its attempts are counted.
        _note_submitted(first, ids[first.name], before, folder, report)
        for stage in needed:
            store_site(stage.site, slurm_directory(stage.directory))
            if stage is not first:
                before = ids.get(stage.recipe.previous or "", after)
                id = ids[stage.name] = JobScript(stage.directory, stage.site, folder, before).submit()
                submitted[stage.directory] = id
                _note_submitted(stage, id, before, folder, report)
    return ids


def _note_submitted(stage: PlannedStage, id: str, after: str | None, code: Path, report: Callable[[str], None]) -> None:
    facts = {"nodes": stage.site.nodes, "ranks": stage.site.ranks, "after": after, "code": code.name}
    note_job_event(stage.directory, "submitted", id, committed=committed_step(stage.directory), **facts)
    report(f"{stage.name}: job {id}" + (f", after job {after.replace(':', ' and ')}" if after else ""))


def _refuse_another_recipe(chain: ChainRecipe, run: Path) -> None:
    """Until its job is noted, a run may be begun anew with another recipe; see whether another command just did."""
    try:
        check_run_directory(resolve_chain_paths(chain), run, bound=True)
    except RecipeError as error:
        raise SubmissionLostError(str(error)) from None


def cancel_jobs(run: Path, stages: list[str]) -> list[str]:
    """Cancel the jobs of a run, except those of stages that another run trains for it; a sentence per job. A file in
    the run directory also stops the jobs that Slurm cannot be asked about now."""
    stages = [name for name in stages if not (run / name).is_symlink()]
    (run / CANCELLED_FILE).write_text("by `fcmae cancel`; `fcmae resume` removes this file\n")
    try:
        live = live_jobs(run, stages)
        # The last stage first, so that no job starts because the one before it has ended.
        for job in sorted(live, key=lambda job: (stages.index(job.directory.name), int(job.id)), reverse=True):
            client.cancel_job(job.id)
            note_job_event(job.directory, "cancelled", job.id, reason="by `fcmae cancel`")
    except client.NoControllerError as error:
        return [
            f"{error}; until then running stages save and stop within seconds, and stages that start later stop at once"
        ]
    sentences = [f"{job.directory.name}: job {job.id} is cancelled ({job.state} until now)" for job in live]
    return sentences or ["no job of this run waits or runs"]


def refuse_beside_jobs(run: Path, stages: Iterable[str]) -> None:
    """Refuse to train here what a job of the run trains, or will train. Asks Slurm only if a job was ever submitted.

    Raises:
        LaunchError: naming the job.
    """
    stages = list(stages)
    if not any(slurm_directory(run / name).is_dir() for name in stages):
        return
    try:
        live = live_jobs(run, stages)
    except LaunchError:  # no Slurm here, or no answer; a stage that runs elsewhere is refused by its attempt's claim
        return
    if live:
        raise LaunchError(
            f"job {live[0].id} of stage {live[0].directory.name} is {live[0].state} in Slurm; wait for it, or"
            f" `fcmae cancel {run}` first"
        )
