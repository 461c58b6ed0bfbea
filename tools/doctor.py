"""What this machine has and lacks for the pipeline, each with how to get it."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from cluster.check_results import CheckResult, Level
from cluster.preflight.host import GIB, available_memory_bytes

INSTALL = "see docs/install.md"
FFCV = "1.0.2"
SLURM = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
IMPORT_SECONDS = 120
OPEN_FILES, SHARED_MEMORY_GIB, DISK_GIB, MEMORY_GIB = 4096, 1.0, 10.0, 4.0


def doctor() -> list[CheckResult]:
    """Every check of this file. What is missing keeps stages from running; the rest is only good to know."""
    checks: list[Callable[[], Iterator[CheckResult]]] = [
        _python, _torch, _ffcv, _compiler, _deepspeed, _spconv, _triton, _submitit, _slurm, _mlflow, _stores,
        _memory, _disk, _limits,
    ]  # fmt: skip
    return [found for check in checks for found in check()]


def _python() -> Iterator[CheckResult]:
    enough = sys.version_info >= (3, 11)
    remedy = "" if enough else "3.11 or newer is needed"
    yield CheckResult("python", Level.OK if enough else Level.MISSING, platform.python_version(), remedy)


def _torch() -> Iterator[CheckResult]:
    if trouble := _import("torch"):
        yield CheckResult("torch", Level.MISSING, trouble, f"pip install torch; {INSTALL}")
        return
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield CheckResult("torch", Level.OK, f"{torch.__version__}, CUDA {torch.version.cuda}, {', '.join(names)}")
    elif shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
        remedy = "see whether `nvidia-smi` works" if torch.version.cuda else f"install a CUDA build of torch; {INSTALL}"
        yield CheckResult(
            "torch", Level.WARNING, f"{torch.__version__}, {built}, reaches no GPU of this machine", remedy
        )
    else:
        yield CheckResult("torch", Level.OK, f"{torch.__version__}, no GPU here: stages run on CPUs (gloo, float32)")


def _ffcv() -> Iterator[CheckResult]:
    trouble, version = _import("ffcv.libffcv"), _version("ffcv")
    if trouble:
        remedy = f"tools/setup/setup.sh installs it on Debian; elsewhere {INSTALL}"
        if ".so" in trouble:
            remedy = f"libturbojpeg0 and libopencv-imgproc406 on Debian; elsewhere {INSTALL}"
        yield CheckResult("ffcv", Level.MISSING, trouble, remedy)
    elif version != FFCV:
        yield CheckResult("ffcv", Level.WARNING, f"{version}; made for {FFCV}", f"pip install --no-deps ffcv=={FFCV}")
    else:
        yield CheckResult("ffcv", Level.OK, f"{version}, with libturbojpeg and OpenCV")


def _compiler() -> Iterator[CheckResult]:
    if shutil.which("g++"):
        yield CheckResult("g++", Level.OK, shutil.which("g++") or "")
    else:
        remedy = "needed to build FFCV, by torch.compile and by Triton's kernels: apt-get install g++"
        yield CheckResult("g++", Level.WARNING, "not on PATH", remedy)


def _deepspeed() -> Iterator[CheckResult]:
    yield _pinned("deepspeed", "deepspeed", "engine.kind: deepspeed")


def _spconv() -> Iterator[CheckResult]:
    builds = sorted(name for name in _installed() if name == "spconv" or name.startswith("spconv-cu"))
    use = "encoder_backend: spconv"
    if not builds:
        yield CheckResult("spconv", Level.SKIPPED, f"not installed; only {use} needs it", _how_to_get("spconv"))
        return
    found = f"{', '.join(f'{name} {_version(name)}' for name in builds)}"
    if trouble := _import("spconv.pytorch"):
        yield CheckResult(
            "spconv", Level.WARNING, f"{found}: {trouble}", f"{use} will not work; {_how_to_get('spconv')}"
        )
    elif builds == ["spconv"] and shutil.which("nvidia-smi"):
        remedy = "pip uninstall spconv cumm; pip install spconv-cu126==2.3.8"
        yield CheckResult("spconv", Level.WARNING, f"{found} is the build for CPUs", remedy)
    elif _version(builds[0]) != _pin("spconv", "spconv"):
        yield CheckResult(
            "spconv", Level.WARNING, f"{found}; made for {_pin('spconv', 'spconv')}", _how_to_get("spconv")
        )
    else:
        yield CheckResult("spconv", Level.OK, found)


def _triton() -> Iterator[CheckResult]:
    version = _version("triton")
    if version is None:
        yield CheckResult("triton", Level.SKIPPED, "not installed; a CUDA build of torch brings its own")
    elif trouble := _import("triton"):
        yield CheckResult("triton", Level.WARNING, trouble, "reinstall torch with its triton")
    else:
        yield CheckResult("triton", Level.OK, version)


def _submitit() -> Iterator[CheckResult]:
    version = _version("submitit")
    if version is None:
        yield CheckResult("submitit", Level.WARNING, "not installed", "`fcmae submit` needs it: pip install submitit")
    else:
        yield CheckResult("submitit", Level.OK, version)


def _slurm() -> Iterator[CheckResult]:
    absent = [name for name in SLURM if not shutil.which(name)]
    if absent:
        remedy = "`fcmae run` does without; to submit, be on a machine of the cluster, or see tools/devcluster"
        yield CheckResult("slurm", Level.SKIPPED, f"not on PATH: {', '.join(absent)}", remedy)
        return
    try:
        ran = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=10, check=False)
        asked = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        yield CheckResult("slurm", Level.WARNING, "slurmctld did not answer within 10 s", "see `scontrol ping`")
        return
    if asked.returncode != 0:
        said = " ".join(asked.stderr.split())[:160]
        yield CheckResult("slurm", Level.WARNING, said, "see `scontrol ping`; SLURM_CONF names the configuration")
    else:
        partitions = ", ".join(asked.stdout.split()[:6])
        yield CheckResult("slurm", Level.OK, f"{ran.stdout.strip()}, partitions {partitions}")


def _mlflow() -> Iterator[CheckResult]:
    """Opens a new sqlite store, as a run without tracking.mlflow_uri does."""
    code = (
        "import sys, logging; logging.disable(logging.WARNING); from mlflow import MlflowClient;"
        "MlflowClient(tracking_uri=f'sqlite:///{sys.argv[1]}/m.db').create_experiment('x')"
    )
    with tempfile.TemporaryDirectory() as folder:
        trouble = _run_python(code, folder)
    if trouble:
        remedy = "pip install mlflow-skinny sqlalchemy alembic, or set tracking.mlflow=false"
        yield CheckResult("mlflow", Level.WARNING, trouble, remedy)
    else:
        yield CheckResult(
            "mlflow", Level.OK, f"{_version('mlflow-skinny') or _version('mlflow')}, opens a sqlite store"
        )


def _stores() -> Iterator[CheckResult]:
    if trouble := _run_python("import fsspec; fsspec.get_filesystem_class('s3')"):
        yield CheckResult("s3", Level.SKIPPED, f"{trouble}; only s3:// paths need it", _how_to_get("s3"))
    else:
        yield CheckResult("s3", Level.OK, f"s3fs {_version('s3fs')}")


def _memory() -> Iterator[CheckResult]:
    free = available_memory_bytes() / GIB
    remedy = "" if free >= MEMORY_GIB else "a rank with its FFCV workers takes about 1 GiB, and the model's state"
    level = Level.OK if free >= MEMORY_GIB else Level.WARNING
    yield CheckResult("memory", level, f"{free:.1f} GiB free, {os.cpu_count()} cores", remedy, free)


def _disk() -> Iterator[CheckResult]:
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / GIB
        remedy = "" if free >= DISK_GIB else "ImageNet-1K takes 102 GB at 256 pixels; TMPDIR names another folder"
        level = Level.OK if free >= DISK_GIB else Level.WARNING
        yield CheckResult(name, level, f"{folder}: {free:.1f} GiB free", remedy, free)
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).free / GIB if shared.exists() else 0.0
    remedy = "" if size >= SHARED_MEMORY_GIB else "NCCL and the writer of .beton files use it: docker run --shm-size=8g"
    level = Level.OK if size >= SHARED_MEMORY_GIB else Level.WARNING
    yield CheckResult("/dev/shm", level, f"{size:.1f} GiB free", remedy, size)


def _limits() -> Iterator[CheckResult]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES}; in jobs: what /etc/security/limits.conf says there"
    yield CheckResult("open files", Level.OK if enough else Level.WARNING, _limit(files), remedy, files)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    fast = Path("/sys/class/infiniband").exists()
    enough = locked == resource.RLIM_INFINITY or not fast
    remedy = "" if enough else "InfiniBand needs it unlimited: ulimit -l unlimited, or slurmd's LimitMEMLOCK"
    amount = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    yield CheckResult("locked memory", Level.OK if enough else Level.WARNING, amount, remedy)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


# -- packages


def _pinned(name: str, extra: str, use: str) -> CheckResult:
    version, wanted = _version(name), _pin(name, extra)
    if version is None:
        return CheckResult(name, Level.SKIPPED, f"not installed; only {use} needs it", _how_to_get(extra))
    if wanted and version != wanted:
        return CheckResult(name, Level.WARNING, f"{version}; {use} is made for {wanted}", _how_to_get(extra))
    return CheckResult(name, Level.OK, version)


def _how_to_get(extra: str) -> str:
    return f"pip install 'fcmae[{extra}]'"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pin(name: str, extra: str) -> str | None:
    """The version that our own extra asks for."""
    for text in importlib.metadata.requires("fcmae") or []:
        wanted = Requirement(text)
        if wanted.name == name and wanted.marker and wanted.marker.evaluate({"extra": extra}):
            return next((part.version for part in wanted.specifier if part.operator == "=="), None)
    return None


@cache
def _installed() -> set[str]:
    return {dist.name.lower().replace("_", "-") for dist in importlib.metadata.distributions() if dist.name}


def _import(module: str) -> str:
    return _run_python(f"import {module}")


def _run_python(code: str, *arguments: str) -> str:
    """Why this code fails, in a process of its own: what crashes there spares us. Empty if it does not."""
    try:
        command = [sys.executable, "-c", code, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {IMPORT_SECONDS} s"
    if ran.returncode == 0:
        return ""
    lines = ran.stderr.strip().splitlines()
    return lines[-1][:200] if ran.returncode > 0 and lines else f"ended with code {ran.returncode}"
