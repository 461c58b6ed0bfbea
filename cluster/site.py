"""A site: what a cluster offers and how jobs are submitted there, in a strict YAML file.

No field is read by a shell: the job script quotes them all. Shell commands belong in a file that `source` names.
"""

import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from cluster.preflight.settings import PreflightSettings
from cluster.slurm.job_history import slurm_directory
from pipeline.errors import LaunchError, RecipeError, first_line
from pipeline.recipe.settings_base import YEAR_SECONDS, Settings
from pipeline.recipe.yaml_files import LIBRARY, parse_settings
from pipeline.storage.bounded_files import read_yaml, yaml_text
from pipeline.storage.folder import Folder
from pipeline.url_secrets import find_secret

# In a run directory: the site of the last submission. In a stage's slurm/ folder: the site of its own job.
SITE_FILE = "site.yaml"
INCLUDED_SITES = Path(__file__).parent / "sites"
# Options of sbatch that the job script sets itself; of two values the place in the script would decide.
RESERVED_OPTIONS = {
    "account", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "gpus-per-node", "job-name",
    "kill-on-invalid-dep", "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos",
    "requeue", "no-requeue", "signal", "time", "array", "wrap",
}  # fmt: skip
# Options after which sbatch does not tell the job's number, or only once the job has ended, or after which squeue does
# not list the job, because it runs on another cluster.
LOSING_OPTIONS = {"cluster", "clusters", "parsable", "quiet", "test-only", "wait"}
# Options that hide GPUs from a rank, which takes the GPU of its own number on the node.
BINDING_OPTIONS = {"gpu-bind", "gpus-per-task", "ntasks-per-gpu"}


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
    if sentence := find_secret(path):
        raise ValueError(sentence)
    return path


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]
"""Anything on one line."""
SbatchText = Annotated[Text, AfterValidator(_no_escape)]
"""Anything that sbatch reads without change."""
GPUType = Annotated[SbatchText, StringConstraints(pattern=r"^[^\s:,=()*]+$")]
"""TYPE in `--gpus-per-node=TYPE:4`."""
SharedPath = Annotated[Text, AfterValidator(_expanded)]
"""A path that every node sees. ~ and $NAMES are replaced when the site is read."""
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OptionNumber = Annotated[int, Field(ge=-(10**12), le=10**12)]
Option = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$")]


class Container(Settings):
    """An image that the ranks run in. The batch script runs outside."""

    kind: Literal["pyxis", "apptainer"]
    image: Text
    """The value of --container-image or `apptainer exec`."""
    mounts: tuple[Text, ...] = ()
    """FROM:TO. The run directory is always mounted."""
    python: Text = "python3"
    """The interpreter inside."""


class GPULimits(Settings):
    """The most that real programs get out of a GPU and its links, which is less than its data sheet promises.

    `fcmae estimate` predicts the time of a step from it.
    """

    bf16_tflops: float = Field(gt=0, le=1e9)
    """Of dense matrix products of the model's sizes, 10^12 floating-point operations a second."""
    memory_tb_per_second: float = Field(gt=0, le=1e6)
    """Of a copy within the GPU's memory, bytes read and written, 10^12 bytes a second."""
    node_gb_per_second: float = Field(gt=0, le=1e9)
    """Of one GPU to the others of its node in a collective, 10^9 bytes a second."""
    network_gb_per_second: float = Field(gt=0, le=1e9)
    """Of a node with all its network cards to other nodes in a collective."""


class GPU(Settings):
    """A GPU by its data sheet. `fcmae estimate` uses all fields, `fcmae submit` the memory."""

    name: Text
    memory_gib: float = Field(gt=0, le=1e6)
    bf16_tflops: float = Field(gt=0, le=1e9)
    """Dense matrix products, 10^12 floating-point operations a second; a multiply-add is two."""
    fp32_tflops: float = Field(gt=0, le=1e9)
    utilisation: float = Field(0.25, gt=0, le=1)
    """The part of these rates that training is assumed to reach without `limits` and without a measured step."""
    limits: GPULimits | None = None
    """What programs reach; null leaves the time of a step to `utilisation`."""


class Site(Settings):
    """Where and how the jobs of a run are submitted."""

    partition: SbatchText | None = None
    """Null leaves it to the cluster."""
    account: SbatchText | None = None
    qos: SbatchText | None = None
    nodes: int = Field(1, ge=1, le=100_000)
    gpus_per_node: int = Field(0, ge=0, le=4096)
    gpu_type: GPUType | None = None
    """The type to ask for, where a partition has several: a name of the cluster's gres (a100, 1g.5gb)."""
    gpu: GPU | None = None
    """The data sheet of the GPUs. A stage that needs more memory by estimate is not submitted; null skips the check."""
    tasks_per_node: int | None = Field(None, ge=1, le=4096)
    """Ranks on each node; null is one per GPU, or one on a node without GPUs."""
    cpus_per_task: int = Field(1, ge=1, le=4096)
    memory_gb_per_node: float | None = Field(None, gt=0, le=1e6)
    """Null leaves it to the cluster."""
    time_limit_minutes: int = Field(60, ge=1, le=YEAR_SECONDS // 60)
    """The limit of one run of a job. A stage may need several runs: each saves and is requeued, the next resumes."""
    stop_before_end_seconds: int = Field(120, ge=10, le=65535)
    """How long before the time limit Slurm tells the ranks to save. They stop earlier by themselves if their steps and
    saves were measured to take longer."""
    attempts_without_progress: int = Field(3, ge=1, le=1_000_000)
    """How often a stage is retried: it fails when so many attempts in a row committed no new step."""
    failures_per_node_day: float = Field(0.004, gt=0, le=1000)
    """How often a node fails, or something on it that ends the job. `fcmae status` derives from it how often to save.
    The default is that of Llama 3's training: 419 unplanned interruptions of 2,048 nodes in 54 days (arXiv 2407.21783,
    section 3.3.4)."""
    constraint: SbatchText | None = None
    exclude: tuple[SbatchText, ...] = ()
    """Nodes that jobs must not use."""
    modules: tuple[Text, ...] = ()
    """Names for `module load`, in this order."""
    source: tuple[SharedPath, ...] = ()
    """Shell files that the job script sources before it starts the ranks."""
    environment: dict[Variable, Annotated[str, AfterValidator(_printable)]] = Field({})
    container: Container | None = None
    local_scratch: Text | None = None
    """A folder on the node's own disk. $NAMES are replaced inside the job."""
    run_root: SharedPath | None = None
    """A folder that every node sees by the same path. A relative --out lies in it."""
    data_cache: SharedPath | None = None
    """A folder that every node sees, for what is prepared from folders of images. Null is the submitting user's
    cache."""
    sbatch: dict[Option, SbatchText | OptionNumber | Literal[True]] = Field({})
    """Further options of sbatch, without their dashes; true for an option without value."""
    preflight: PreflightSettings = PreflightSettings()
    """What a node must offer before a rank trains on it."""
    stages: dict[str, dict[str, Any]] = Field({})
    """Fields that differ for a stage, by its name."""

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
            raise ValueError(
                f"gpu_type is {self.gpu_type}, but gpus_per_node is 0; set how many, or leave gpu_type out"
            )
        if reserved := sorted(RESERVED_OPTIONS & self.sbatch.keys()):
            raise ValueError(f"sbatch.{reserved[0]} is set by fcmae itself; remove it, or use the site's own field")
        if losing := sorted(LOSING_OPTIONS & self.sbatch.keys()):
            raise ValueError(
                f"sbatch.{losing[0]} would keep fcmae from finding the job that it submits; remove it"
                + (", and submit from a machine of that cluster" if losing[0].startswith("cluster") else "")
            )
        if binding := sorted(BINDING_OPTIONS & self.sbatch.keys()):
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
            ValueError: naming the wrong field of the stage.
        """
        own = self.stages.get(name, {})
        if wrong := sorted({"stages", "run_root", "data_cache"} & own.keys()):
            raise ValueError(f"stages.{name}.{wrong[0]} cannot differ by stage; set it for the whole site")
        shared = self.model_dump(mode="json", exclude={"stages"})
        try:
            return parse_settings(Site, {**shared, **own}, f"stages.{name}")
        except RecipeError as error:
            raise ValueError(str(error)) from None


def load_site(name: str) -> Site:
    """Read a site by its path, or by the name of an included example.

    Raises:
        LaunchError: if there is none.
        RecipeError: naming the file and field, the value, and what is allowed.
    """
    path = next((p for p in (Path(name), INCLUDED_SITES / f"{name.removesuffix('.yaml')}.yaml") if p.is_file()), None)
    if path is None:
        included = ", ".join(sorted(p.stem for p in INCLUDED_SITES.glob("*.yaml")))
        raise LaunchError(f"there is no site {name}, neither as a file nor among the included ones ({included})")
    try:
        raw = read_yaml(path)
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"{path} cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(raw, dict):
        raise LaunchError(f"{path} holds a {type(raw).__name__}; a site is a mapping of keys to values")
    return parse_settings(Site, raw, str(path))


def check_stage_names(site: Site, stages: Collection[str]) -> None:
    """Refuse a site with fields for a stage that is neither in this recipe nor in an included one. A site may serve
    many recipes.

    Raises:
        RecipeError: naming the stage and similar ones.
    """
    unknown = sorted(site.stages.keys() - set(stages))
    if unknown and (unknown := [name for name in unknown if name not in _included_stages()]):
        near = get_close_matches(unknown[0], stages, n=3, cutoff=0.5) or sorted(stages)
        raise RecipeError(f"site: unknown key stages.{unknown[0]}; did you mean {' or '.join(near)}?")


@cache
def _included_stages() -> set[str]:
    recipes = [read_yaml(path) for path in LIBRARY.rglob("*.yaml")]
    return {name for recipe in recipes if isinstance(recipe, dict) for name in recipe.get("stages") or ()}


def check_path(path: Path) -> Path:
    """Return a run directory that sbatch, srun and PYTHONPATH read without change.

    Raises:
        LaunchError: naming the character that one of them would misread.
    """
    odd = next((c for c in str(path) if c in "%\\:," or not c.isprintable()), None)
    if odd is not None:
        raise LaunchError(f"--out {str(path)!r} holds {odd!r}, which Slurm or Python would misread; choose another")
    return path


def store_site(site: Site, folder: Path) -> None:
    """Write the site into a folder."""
    # Atomically: a job that starts in this moment reads the file, and half a site would fail its stage.
    Folder.at(folder).publish(SITE_FILE, yaml_text(site.model_dump(mode="json")).encode())


def stored_site(run: Path, stage: str | None = None) -> Site:
    """The site that a run was last submitted to; for a stage, the site that its own job was submitted to, as the stage
    sees it.

    Raises:
        LaunchError: if the run was never submitted.
    """
    if stage and (own := slurm_directory(run / stage) / SITE_FILE).exists():
        return load_site(str(own))
    if not (run / SITE_FILE).exists():
        raise LaunchError(f"{run} was never submitted, so its site is not known; give --site")
    site = load_site(str(run / SITE_FILE))
    return site.for_stage(stage) if stage else site
