"""The job script of a stage, made by submitit: one srun task per rank, and after them the supervisor."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.site import Site
from cluster.slurm import client
from cluster.slurm.job_history import slurm_directory
from cluster.slurm.worker import RunStage, block_stop_signals
from pipeline.errors import LaunchError
from pipeline.tracking.startup import JOB_STARTED

SBATCH_SECONDS = 60  # a full queue makes sbatch try again for minutes; nobody need wait for that
UNAVAILABLE = "Requested node configuration is not available"


class JobScript:
    """What is submitted for one stage.

    Args:
        stage_directory: absolute; need not exist before `submit`.
        site: as this stage sees it.
        code: the snapshot that the job runs.
        after: id of the job to wait for.
    """

    def __init__(self, stage_directory: Path, site: Site, code: Path, after: str | None = None):
        self.stage_directory, self.site = stage_directory, site
        self._executor = _executor(slurm_directory(stage_directory), _python(site, stage_directory, code))
        parameters = _parameters(stage_directory, site, code, after)
        self._executor.update_parameters(
            **{name: value for name, value in parameters.items() if value is not None},
            wckey=None,
            setup=_setup(site, code),
            teardown=[
                "code=$?",
                f'{shlex.quote(sys.executable)} -m cluster.slurm.supervisor {shlex.quote(str(stage_directory))} "$code"'
                f" {site.attempts_without_progress}",
            ],
        )

    def text(self) -> str:
        """The script, to the letter."""
        return self._executor._make_submission_file_text(self._executor._submitit_command_str, "")

    def test(self) -> str:
        """Ask Slurm whether it would take the job.

        Returns:
            A warning if only sbatch itself can tell, or nothing.

        Raises:
            LaunchError: with Slurm's reason.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(self.text())
            file.flush()
            try:
                with _only_what_the_script_asks():
                    answer = subprocess.run(
                        ["sbatch", "--test-only", file.name],
                        capture_output=True,
                        text=True,
                        timeout=SBATCH_SECONDS,
                        check=False,
                    )
            except FileNotFoundError:
                raise LaunchError(
                    "there is no sbatch on PATH; submit from a machine of the Slurm cluster, or use `fcmae run`"
                ) from None
            except subprocess.TimeoutExpired:
                raise LaunchError(f"sbatch --test-only had no answer in {SBATCH_SECONDS} s; is slurmctld up?") from None
        if answer.returncode == 0:
            return ""
        reason, stage = _reason(answer.stderr), self.stage_directory.name
        # --test-only asks for a start with the nodes that are up; sbatch lets a job wait for the others.
        if UNAVAILABLE in reason and client.has_nodes_out_of_service(self.site.partition):
            return f"stage {stage}: {reason} now, for some nodes are down, drained or reserved; it may have to wait"
        raise LaunchError(f"Slurm would refuse stage {stage}: {reason}")

    def submit(self) -> str:
        """Queue the job; its id.

        Raises:
            LaunchError: with Slurm's reason.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if not shutil.which("sbatch"):
            raise LaunchError("there is no sbatch on PATH; submit from a machine of the Slurm cluster")
        try:
            with _only_what_the_script_asks():
                job = self._executor.submit(RunStage(self.stage_directory))
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch refused stage {self.stage_directory.name}: {_reason(str(error))}") from None
        return str(job.job_id)


def _parameters(stage_directory: Path, site: Site, code: Path, after: str | None) -> dict[str, Any]:
    return {
        "job_name": job_name(stage_directory),
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": site.nodes,
        "ntasks_per_node": site.ranks_per_node,
        "gpus_per_node": f"{site.gpu_type}:{site.gpus_per_node}" if site.gpu_type else site.gpus_per_node or None,
        "cpus_per_task": site.cpus_per_task,
        "mem": None if site.memory_gb_per_node is None else f"{round(site.memory_gb_per_node * 1024)}M",
        "time": site.time_limit_minutes,
        "signal_delay_s": site.stop_before_end_seconds,
        "constraint": site.constraint,
        "exclude": ",".join(site.exclude) or None,
        "dependency": after and f"afterok:{after}",
        "stderr_to_stdout": True,
        "additional_parameters": {
            **site.sbatch,
            "chdir": str(stage_directory),  # also how a job is found again, whoever has lost its id
            "requeue": True,
            "kill-on-invalid-dep": "yes",
        },
        # One dead rank ends the others, which would wait for it. Since Slurm 22.05 srun does not inherit sbatch's CPUs
        # per task. And after `sbatch --export=NONE` it would withhold from the ranks what this script exports.
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--export=ALL",
            f"--cpus-per-task={site.cpus_per_task}",
            *_pyxis(site, stage_directory, code),
        ],
    }


def job_name(stage_directory: Path) -> str:
    return f"fcmae-{stage_directory.name}"


def _setup(site: Site, code: Path) -> list[str]:
    # Threads decide how sums are rounded: as many as cores, like the ranks of `fcmae run`, whatever the shell that
    # submits has in its environment.
    exports = {"OMP_NUM_THREADS": str(site.cpus_per_task), **site.environment}
    if site.local_scratch:
        exports["FCMAE_SCRATCH"] = site.local_scratch
    return [
        f"export {JOB_STARTED}=$(date +%s.%3N)",
        # Whatever the shell is told, its ranks are told too; it lives on to see to what becomes of them.
        "trap : TERM INT USR1 USR2",
        *[f"module load {shlex.quote(name)}" for name in site.modules],
        *[f"source {shlex.quote(name)}" for name in site.source],
        *[f"export {name}={shlex.quote(value)}" for name, value in exports.items()],
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        # Slurm sets it itself since 23.02.
        'export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s)}"',
    ]


def _pyxis(site: Site, stage_directory: Path, code: Path) -> list[str]:
    if site.container is None or site.container.kind != "pyxis":
        return []
    return [
        f"--container-image={site.container.image}",
        f"--container-mounts={','.join(_mounts(site, stage_directory, code))}",
    ]


def _python(site: Site, stage_directory: Path, code: Path) -> str:
    """The command that starts a rank's interpreter, for a shell."""
    container, command = site.container, [sys.executable]
    if container is not None:
        command = [container.python]
        if container.kind == "apptainer":
            gpus = ["--nv"] if site.gpus_per_node else []
            binds = [f"--bind={mount}" for mount in _mounts(site, stage_directory, code)]
            command = ["apptainer", "exec", *gpus, *binds, container.image, container.python]
    return shlex.join([*command, "-IS", "-c", block_stop_signals()])


def _mounts(site: Site, stage_directory: Path, code: Path) -> list[str]:
    run = stage_directory.parent
    own = [run] if code.is_relative_to(run) else [run, code]  # the runs of a study share theirs
    return [*(f"{folder}:{folder}" for folder in own), *site.container.mounts]


@contextmanager
def _only_what_the_script_asks() -> Iterator[None]:
    """Hide what a shell has set for sbatch, which would overrule the script without a word, and the job that we are
    submitted from: sbatch would hand its memory, CPUs and tasks on to our srun."""
    inside = "SLURM_JOB_ID" in os.environ
    names = [name for name in os.environ if inside and name.startswith("SLURM_") and name != "SLURM_CONF"]
    names += [name for name in os.environ if name.startswith("SBATCH_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _executor(folder: Path, python: str) -> Any:
    try:
        import submitit
    except ImportError:
        raise LaunchError("submitit is not installed; run `pip install submitit`, or use `fcmae run`") from None

    class Executor(submitit.SlurmExecutor):
        job_class = submitit.SlurmJob

        @classmethod
        def affinity(cls) -> int:
            return 2  # a script can be shown where there is no Slurm

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["timeout", str(SBATCH_SECONDS), "sbatch", str(submission_file_path)]

    return Executor(folder, python=python)


def _reason(said: str) -> str:
    """sbatch's words without its ornaments."""
    if "temporarily una" in said:  # sbatch: unable to accept job; sbatch --test-only: Resource ... unavailable
        return "the queue is full; the same command goes on from here when there is room"
    found = re.findall(r"error: (.+)", said)
    return " ".join((found[-1] if found else said.strip() or "no reason given").split())
