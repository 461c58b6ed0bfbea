"""The job script of a stage, made by submitit: one srun task per rank, and after them the supervisor."""

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.site import Site
from cluster.slurm import client, verified_start
from cluster.slurm.job_history import slurm_directory
from cluster.slurm.time_limit import TIME_LEFT
from cluster.slurm.verified_start import CHANGED, hash_folder
from cluster.slurm.worker import RunStage
from pipeline.distributed.processes import module_command
from pipeline.errors import LaunchError
from pipeline.stage.environment import CODE
from pipeline.tracking.startup import JOB_STARTED

_START = Path(verified_start.__file__).read_text()
SBATCH_SECONDS = 60  # with a full queue sbatch would retry for minutes


class JobScript:
    """The job of one stage.

    Args:
        stage_directory: absolute; need not exist before `submit`.
        site: as this stage sees it.
        code: the code snapshot that the job runs.
        after: id of the job to wait for, or several with colons between them.
    """

    def __init__(self, stage_directory: Path, site: Site, code: Path, after: str | None = None):
        self.stage_directory, self.site, self.code = stage_directory, site, code
        self._executor = _executor(slurm_directory(stage_directory), self._start_python())
        parameters = self._parameters(after)
        self._executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None},
                                         wckey=None, setup=self._setup(), teardown=self._teardown())  # fmt: skip

    def text(self) -> str:
        """The script as it is submitted."""
        return self._executor._make_submission_file_text(self._executor._submitit_command_str, "")

    def test(self) -> str:
        """Ask Slurm whether it would accept the job.

        Returns:
            A warning if the job may have to wait for nodes that are out of service; otherwise "".

        Raises:
            NoControllerError: if slurmctld does not answer.
            LaunchError: with Slurm's reason.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, _without_inherited_settings():
            file.write(self.text())
            file.flush()
            try:
                client.run_command("sbatch", "--test-only", file.name)
            except client.CommandError as error:
                reason, stage = _reason(error.words), self.stage_directory.name
            else:
                return ""
        # --test-only refuses what cannot start with the nodes that are up; sbatch lets a job wait for the others.
        if client.TOO_FEW_NODES in reason and client.has_nodes_out_of_service(self.site.partition):
            return f"stage {stage}: {reason} now, for some nodes are down, drained or reserved; it may have to wait"
        raise LaunchError(f"Slurm would refuse stage {stage}: {reason}")

    def submit(self, *, ticket: bool = False) -> str:
        """Queue the job; its id.

        Args:
            ticket: queue it held, as the ticket of a submission (`cluster.slurm.ticket`).

        Raises:
            LaunchError: with Slurm's reason.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        if not shutil.which("sbatch"):
            raise LaunchError("there is no sbatch on PATH; submit from a machine of the Slurm cluster")
        if ticket:
            options = self._executor.parameters["additional_parameters"]
            self._executor.update_parameters(
                job_name=client.job_name(self.stage_directory) + client.TICKET,
                additional_parameters={**options, "hold": True},
            )
        try:
            self._executor.update_parameters(setup=self._setup(hash_folder(str(self.code))))
        except OSError as error:
            raise LaunchError(f"the copy of the code in {self.code} cannot be read ({error.strerror})") from None
        try:
            with _without_inherited_settings():
                job = self._executor.submit(RunStage(self.stage_directory))
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch refused stage {self.stage_directory.name}: {_reason(str(error))}") from None
        return str(job.job_id)

    def _parameters(self, after: str | None) -> dict[str, Any]:
        """What sbatch and srun are asked for, by submitit's names; None leaves it to the cluster."""
        site = self.site
        gpus = f"{site.gpu_type}:{site.gpus_per_node}" if site.gpu_type else site.gpus_per_node or None
        return {
            "job_name": client.job_name(self.stage_directory),
            "partition": site.partition,
            "account": site.account,
            "qos": site.qos,
            "nodes": site.nodes,
            "ntasks_per_node": site.ranks_per_node,
            "gpus_per_node": gpus,
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
                "chdir": str(self.stage_directory),  # jobs are also found by their directory, without their id
                "requeue": True,
                "kill-on-invalid-dep": "yes",
            },
            "srun_args": [
                "--kill-on-bad-exit=1",  # otherwise the other ranks would wait for a dead one
                "--export=ALL",  # after `sbatch --export=NONE` srun would hide this script's exports from the ranks
                f"--cpus-per-task={site.cpus_per_task}",  # srun does not inherit it from sbatch since Slurm 22.05
                *self._pyxis_arguments(),
            ],
        }

    def _setup(self, code_hash: str = "HASH-OF-THE-CODE") -> list[str]:
        """Shell lines before srun."""
        site, code = self.site, shlex.quote(str(self.code))
        # The number of threads decides how sums are rounded: as many as cores, like the ranks of `fcmae run`, whatever
        # the submitting shell has in its environment.
        exports = {"OMP_NUM_THREADS": str(site.cpus_per_task), **site.environment}
        if site.local_scratch:
            exports["FCMAE_SCRATCH"] = site.local_scratch
        return [
            f"export {JOB_STARTED}=$(date +%s.%3N)",
            # Ignore stop signals here: the ranks receive them too, and this shell must survive to run the supervisor.
            "trap : TERM INT USR1 USR2",
            *[f"module load {shlex.quote(name)}" for name in site.modules],
            *[f"source {shlex.quote(name)}" for name in site.source],
            *[f"export {name}={shlex.quote(value)}" for name, value in exports.items()],
            # The copy of the code must keep its hash, so Python writes no compiled code into it.
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1",
            f"export {CODE}={code}",
            f"start={shlex.quote(_START)} code_hash={code_hash}",
            f"{shlex.quote(sys.executable)} {self._verified()} || [ $? != {CHANGED} ] || exit 1",
            # slurmctld's clock and the node's may differ, so ask for the time that is left, not for the end.
            f'export {TIME_LEFT}="$(hostname) $(cut -d. -f1 /proc/uptime) $(squeue -h -j "$SLURM_JOB_ID" -o %L)"',
        ]

    def _teardown(self) -> list[str]:
        """Shell lines after srun."""
        python, *supervisor = module_command("cluster.slurm.supervisor", self.stage_directory)
        command = f"{shlex.quote(python)} {self._verified()} {shlex.join(supervisor)}"
        return ["code=$?", f'{command} "$code" {self.site.attempts_without_progress}']

    def _verified(self) -> str:
        """Arguments of Python that compare the code snapshot, and then run Python with the arguments that follow."""
        return f'-IS -c "$start" {shlex.quote(str(self.code))} "$code_hash" {shlex.quote(str(self.stage_directory))}'

    def _start_python(self) -> str:
        """The shell command that starts a rank's interpreter."""
        container, command = self.site.container, [sys.executable]
        if container is not None:
            command = [container.python]
            if container.kind == "apptainer":
                gpus = ["--nv"] if self.site.gpus_per_node else []
                binds = [f"--bind={mount}" for mount in self._mounts()]
                command = ["apptainer", "exec", *gpus, *binds, container.image, container.python]
        return f"{shlex.join(command)} {self._verified()}"

    def _pyxis_arguments(self) -> list[str]:
        container = self.site.container
        if container is None or container.kind != "pyxis":
            return []
        return [f"--container-image={container.image}", f"--container-mounts={','.join(self._mounts())}"]

    def _mounts(self) -> list[str]:
        run = self.stage_directory.parent
        own = [run] if self.code.is_relative_to(run) else [run, self.code]  # the runs of a study share their code
        # and equal stages, of which the one before this stage may lie in another run.
        own += sorted({path.resolve().parent for path in run.glob("*") if path.is_symlink()})
        return [*(f"{folder}:{folder}" for folder in own), *self.site.container.mounts]


@contextmanager
def _without_inherited_settings() -> Iterator[None]:
    """Hide the SBATCH_* variables, which would overrule the script silently, those that would change what squeue prints
    in the job, and the SLURM_* variables of a job that this process runs in, because sbatch would hand that job's
    memory, CPUs and tasks on to the new job."""
    prefixes = ("SBATCH_", *client.OUTPUT_VARIABLES, *(["SLURM_"] if "SLURM_JOB_ID" in os.environ else []))
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")  # they say which cluster, to squeue too
    names = [name for name in os.environ if name.startswith(prefixes) and name not in kept]
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
            return 2  # so that a script can be shown where there is no Slurm

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["timeout", str(SBATCH_SECONDS), "sbatch", str(submission_file_path)]

    return Executor(folder, python=python)


def _reason(message: str) -> str:
    """sbatch's message without its prefixes."""
    if "temporarily una" in message:  # sbatch: unable to accept job; sbatch --test-only: Resource ... unavailable
        return "the queue is full; the same command goes on from here when there is room"
    errors = re.findall(r"error: (.+)", message)
    return " ".join((errors[-1] if errors else message.strip() or "no reason given").split())
