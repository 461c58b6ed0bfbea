"""A site: how one cluster wants to be asked. A YAML file, strict; nothing here knows any cluster by name.

No field is ever read by a shell: all reach the job script quoted. Whoever needs shell commands puts them into a file
and names it under `source`.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from cluster.preflight.settings import PreflightSettings
from cluster.slurm.job_history import slurm_directory
from pipeline.errors import LaunchError, RecipeError
from pipeline.recipe.sections import Settings
from pipeline.recipe.yaml_files import parse_settings
from pipeline.storage.folder import Folder

# In a run directory: the site that it was last submitted to. Beside a stage's jobs: what theirs was submitted to.
SITE = "site.yaml"
INCLUDED = Path(__file__).parent / "sites"
# What we set ourselves; a second value would win or lose by its place in the script.
OURS = {
    "account", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "gpus-per-node", "job-name",
    "kill-on-invalid-dep", "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos",
    "requeue", "no-requeue", "signal", "time", "array", "wrap",
}  # fmt: skip
BINDING = {"gpu-bind", "gpus-per-task", "ntasks-per-gpu"}


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds a line break or another control character; remove it")
    return text


def _no_escape(text: str) -> str:
    if "\\" in text:
        raise ValueError("holds a backslash, which sbatch would take for an escape; remove it")
    return text


def _expanded(text: str) -> str:
    path = os.path.expanduser(os.path.expandvars(text))
    if re.search(r"\$\{?\w", path):
        raise ValueError("names an environment variable that is not set here; set it, or write the path out")
    return path


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]
"""Anything on one line."""
SbatchText = Annotated[Text, AfterValidator(_no_escape)]
"""Anything that sbatch reads back as it was written."""
GPUType = Annotated[SbatchText, StringConstraints(pattern=r"^[^\s:,=()*]+$")]
"""TYPE of `--gpus-per-node=TYPE:4`."""
Place = Annotated[Text, AfterValidator(_expanded)]
"""A path that every node sees. ~ and $NAMES are replaced where the site is read, before anything is submitted."""
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Option = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]


class Container(Settings):
    """An image that the ranks run in. The batch script around them runs outside."""

    kind: Literal["pyxis", "apptainer"]
    image: Text
    """What --container-image or `apptainer exec` is given."""
    mounts: tuple[Text, ...] = ()
    """FROM:TO, beside the run directory, which is always there."""
    python: Text = "python3"
    """The interpreter inside."""


class GPU(Settings):
    """What a GPU can do by its data sheet: `fcmae estimate` reckons with it, `fcmae submit` with its memory."""

    name: Text
    memory_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    """Of dense matrix products, 10^12 floating-point operations a second; a multiply-add is two."""
    fp32_tflops: float = Field(gt=0)
    utilisation: float = Field(0.25, gt=0, le=1)
    """The share of that which training is assumed to reach: a guess until `fcmae estimate --measure` has run there."""


class Site(Settings):
    partition: SbatchText | None = None
    """Where to queue; null leaves it to the cluster."""
    account: SbatchText | None = None
    qos: SbatchText | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    gpu_type: GPUType | None = None
    """Which of them, where a partition has several: a name of the cluster's gres (a100, 1g.5gb)."""
    gpu: GPU | None = None
    """Their kind. A stage that is estimated to need more memory is not submitted; null checks nothing."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks on each node; null is one for each GPU, or one on a node without."""
    cpus_per_task: int = Field(1, ge=1)
    memory_gb_per_node: float | None = Field(None, gt=0)
    """Null leaves it to the cluster."""
    time_limit_minutes: int = Field(60, ge=1)
    """Of one run of a job. A stage may need many: each saves, is requeued and goes on."""
    stop_before_end_seconds: int = Field(120, ge=10, le=65535)
    """How long before the time limit Slurm tells the ranks to save. They stop earlier by themselves if they have
    measured that steps and saves take longer."""
    attempts_without_progress: int = Field(3, ge=1)
    """So many attempts in a row that commit no new step end the stage for good."""
    constraint: SbatchText | None = None
    exclude: tuple[SbatchText, ...] = ()
    """Nodes to stay away from."""
    modules: tuple[Text, ...] = ()
    """`module load` each, in this order."""
    source: tuple[Place, ...] = ()
    """Shell files that the job script sources before it starts the ranks."""
    environment: dict[Variable, Annotated[str, AfterValidator(_printable)]] = Field({})
    container: Container | None = None
    local_scratch: Text | None = None
    """A folder on the node's own disk. $NAMES of environment variables are replaced inside the job, by Python."""
    run_root: Place | None = None
    """A folder that every node sees by the same path: a relative --out lies in it."""
    sbatch: dict[Option, SbatchText | int | Literal[True]] = Field({})
    """Further options of sbatch, without their dashes; true for one without value."""
    preflight: PreflightSettings = PreflightSettings()
    """What a node must have before a rank trains on it."""
    stages: dict[str, dict[str, Any]] = Field({})
    """stage -> fields that differ there."""

    @model_validator(mode="after")
    def _consistent(self) -> "Site":
        if self.stop_before_end_seconds >= self.time_limit_minutes * 60:
            raise ValueError(
                f"stop_before_end_seconds {self.stop_before_end_seconds} leaves no time to train within"
                f" time_limit_minutes {self.time_limit_minutes}; lower the first or raise the second"
            )
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"tasks_per_node {self.tasks_per_node} exceeds gpus_per_node {self.gpus_per_node}, and each rank needs"
                " a GPU of its own; lower it, or leave it out"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"gpu_type {self.gpu_type} says of which type, but gpus_per_node is 0; say how many there")
        if doubled := sorted(OURS & self.sbatch.keys()):
            raise ValueError(f"sbatch.{doubled[0]} is set by fcmae itself; remove it, or use the site's own field")
        if binding := sorted(BINDING & self.sbatch.keys()):
            raise ValueError(
                f"sbatch.{binding[0]} would hide GPUs from ranks, which take the one of their own number on the node;"
                " remove it"
            )
        for name in self.stages:
            self.for_stage(name)
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def for_stage(self, name: str) -> "Site":
        """The site as one stage sees it.

        Raises:
            RecipeError: naming the field of the stage that is wrong.
        """
        own = self.stages.get(name, {})
        if wrong := sorted({"stages", "run_root"} & own.keys()):
            raise ValueError(f"stages.{name}.{wrong[0]} cannot differ by stage; set it for the whole site")
        shared = self.model_dump(mode="json", exclude={"stages"})
        try:
            return parse_settings(Site, {**shared, **own}, f"stages.{name}")
        except RecipeError as error:
            raise ValueError(str(error)) from None


def load_site(name: str) -> Site:
    """A site by path, or by the name of an included example.

    Raises:
        LaunchError: if there is none.
        RecipeError: naming the file and field, the value, and what would be accepted.
    """
    path = next((p for p in (Path(name), INCLUDED / f"{name.removesuffix('.yaml')}.yaml") if p.is_file()), None)
    if path is None:
        included = ", ".join(sorted(p.stem for p in INCLUDED.glob("*.yaml")))
        raise LaunchError(f"there is no site {name}, neither as a file nor among the included ones ({included})")
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LaunchError(f"{path} cannot be read as YAML: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise LaunchError(f"{path} holds a {type(raw).__name__}; a site is a mapping of keys to values")
    return parse_settings(Site, raw, str(path))


def check_path(path: Path) -> Path:
    """A run directory that sbatch, srun and PYTHONPATH all read back as it was written.

    Raises:
        LaunchError: naming the character that one of them would take for something else.
    """
    odd = next((c for c in str(path) if c in "%\\:," or not c.isprintable()), None)
    if odd is not None:
        raise LaunchError(f"--out {str(path)!r} holds {odd!r}, which Slurm or Python would misread; choose another")
    return path


def store_site(site: Site, folder: Path) -> None:
    # At once: a job that starts in this moment reads it, and half a site would end its stage for good.
    Folder.at(folder).publish(SITE, yaml.safe_dump(site.model_dump(mode="json"), sort_keys=False).encode())


def stored_site(run: Path, stage: str | None = None) -> Site:
    """The site that a run was last submitted to; for a stage, as that one sees it, the one that its job was submitted
    to, whichever followed for the others.

    Raises:
        LaunchError: if it never was.
    """
    if stage and (own := slurm_directory(run / stage) / SITE).exists():
        return load_site(str(own))
    if not (run / SITE).exists():
        raise LaunchError(f"{run} was never submitted, so its site is not known; give --site")
    site = load_site(str(run / SITE))
    return site.for_stage(stage) if stage else site
