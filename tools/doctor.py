"""The checks of `fcmae doctor`: what this machine has and lacks for training, each with a remedy."""

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from cluster.check_results import CheckResult, Level
from cluster.preflight.host import GIB, available_memory_bytes

INSTALL = "see docs/install.md"
# Loading torchvision's library tells as much as importing torchvision and timm, in a tenth of the time.
TORCH_PROBE = """
import ctypes, importlib.util, json, pathlib, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
error, vision = "", importlib.util.find_spec("torchvision")
for library in pathlib.Path(vision.origin).parent.glob("_C*.so") if vision else ():
    try:
        ctypes.CDLL(str(library))
    except OSError as problem:
        error = str(problem)
print(json.dumps([torch.__version__, torch.version.cuda, gpus, error]))
"""
LIBRARY_PROBE = """
import ctypes, importlib.util, pathlib, sys
package = importlib.util.find_spec(sys.argv[1])
libraries = list(pathlib.Path(package.origin).parent.glob("*.so")) if package else []
if not libraries:
    raise ImportError(f"{sys.argv[1]} has no compiled library")
for library in libraries:
    ctypes.CDLL(str(library))
"""
FFCV = "1.0.2"
SLURM = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
IMPORT_SECONDS, SLURM_SECONDS = 120, 10
OPEN_FILES, SHARED_MEMORY_GIB, DISK_GIB, MEMORY_GIB = 4096, 1.0, 10.0, 4.0


def check_machine() -> list[CheckResult]:
    """Run all checks. Stages cannot run without what is MISSING; warnings concern speed or single features."""
    checks: list[Callable[[], Iterator[CheckResult]]] = [
        check_python, check_torch, check_ffcv, check_compiler, check_deepspeed, check_spconv, check_triton,
        check_submitit, check_slurm, check_mlflow, check_stores, check_memory, check_disks, check_limits,
    ]  # fmt: skip
    return [result for check in checks for result in check()]


def warm_up() -> None:
    """Do what the first run on a machine does once, so that a run does not wait for it."""
    import matplotlib.font_manager  # lists the fonts, and keeps the list  # noqa: F401
    import torch

    from pipeline.data.decode import compile_decoder
    from pipeline.data.object_views import compile_objects
    from pipeline.data.scenes import compile_scenes
    from pipeline.objectives.region_loops import compile_regions

    compile_decoder()
    compile_scenes(classes=2)
    compile_objects()
    compile_regions()
    if torch.cuda.is_available():
        _compile_kernels()


def _compile_kernels() -> None:
    """Run two steps of the small model on the GPU: Triton keeps the kernels that it compiles, for all batch sizes."""
    from pipeline.cost.measure import measure_steps
    from pipeline.recipe import load_recipe
    from pipeline.storage.announcement import announced
    from pipeline.storage.user_cache import keep_compiled_code_local
    from tools.recipes.library import find_recipe

    keep_compiled_code_local()  # where ranks look for it
    recipe = load_recipe(find_recipe("own-images"), ["stages.pretrain.batch.slot=8"]).stages["pretrain"]
    with announced("compiling the kernels for the GPU, once"):
        measure_steps(recipe, steps=1)


def check_python() -> Iterator[CheckResult]:
    enough = sys.version_info >= (3, 11)
    yield _judge("python", enough, platform.python_version(), "install Python 3.11 or newer", otherwise=Level.MISSING)


def check_torch() -> Iterator[CheckResult]:
    """Import torch, and load torchvision's library, which must be of the same build."""
    output, error = _run(TORCH_PROBE)
    if error:
        yield CheckResult("torch", Level.MISSING, error, f"pip install torch; {INSTALL}")
        return
    version, cuda, names, vision_error = json.loads(output.splitlines()[-1])
    if names:
        yield CheckResult("torch", Level.OK, f"{version}, CUDA {cuda}, {', '.join(names)}")
    elif shutil.which("nvidia-smi"):
        build = f"built for CUDA {cuda}" if cuda else "built for CPUs only"
        remedy = "see whether `nvidia-smi` works" if cuda else f"install a CUDA build of torch; {INSTALL}"
        yield CheckResult("torch", Level.WARNING, f"{version}, {build}, reaches no GPU of this machine", remedy)
    else:
        yield CheckResult("torch", Level.OK, f"{version}, no GPU here: stages run on CPUs (gloo, float32)")
    vision = _version("torchvision")
    if vision is None:
        detail = "not installed; only timm needs it, to compare models with ours"
        yield CheckResult("torchvision", Level.SKIPPED, detail, _pip("test"))
    else:
        source = "https://download.pytorch.org/whl/" + ("cu" + cuda.replace(".", "") if cuda else "cpu")
        remedy = f"to run those tests too: pip install --index-url {source} torchvision"
        other = f"{vision} is of another build than torch {version}; only tests that compare models with timm's need it"
        detail, level = (other, Level.SKIPPED) if vision_error else (vision, Level.OK)
        yield CheckResult("torchvision", level, detail, remedy if vision_error else "")


def check_ffcv() -> Iterator[CheckResult]:
    # Its compiled library alone: importing the package compiles code for seconds, and fails no other way.
    error, version = _error_of(LIBRARY_PROBE, "ffcv"), _version("ffcv")
    if error and version is None:
        error = "not installed; training needs it, the rest does not"
    if error:
        packages = "install libturbojpeg0 and libopencv-imgproc406 on Debian"
        remedy = packages if ".so" in error else "tools/setup/setup.sh installs it on Debian"
        yield CheckResult("ffcv", Level.MISSING, error, f"{remedy}; elsewhere {INSTALL}")
    elif version != FFCV:
        yield CheckResult("ffcv", Level.WARNING, f"{version}; made for {FFCV}", f"pip install --no-deps ffcv=={FFCV}")
    else:
        yield CheckResult("ffcv", Level.OK, f"{version}, with libturbojpeg and OpenCV")


def check_compiler() -> Iterator[CheckResult]:
    path = shutil.which("g++")
    remedy = "FFCV's build, torch.compile and Triton's kernels need it: apt-get install g++"
    yield _judge("g++", path is not None, path or "not on PATH", remedy)
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    remedy = "torch.compile and Triton's kernels need it: apt-get install python3-dev"
    yield _judge("Python.h", header.is_file(), str(header) if header.is_file() else f"no {header}", remedy)


def check_deepspeed() -> Iterator[CheckResult]:
    version, pin, use = _version("deepspeed"), _pinned_version("deepspeed"), "engine.kind: deepspeed"
    if version is None:
        yield CheckResult("deepspeed", Level.SKIPPED, f"not installed; only {use} needs it", _pip("deepspeed"))
    else:
        fits = pin is None or version == pin
        yield _judge("deepspeed", fits, version if fits else f"{version}; {use} is made for {pin}", _pip("deepspeed"))


def check_spconv() -> Iterator[CheckResult]:
    names = {dist.name.lower().replace("_", "-") for dist in importlib.metadata.distributions() if dist.name}
    builds = sorted(name for name in names if name == "spconv" or name.startswith("spconv-cu"))
    use, pin = "encoder_backend: spconv", _pinned_version("spconv")
    installed = ", ".join(f"{name} {_version(name)}" for name in builds)
    if not builds:
        yield CheckResult("spconv", Level.SKIPPED, f"not installed; only {use} needs it", _pip("spconv"))
    elif error := _error_of(LIBRARY_PROBE, "spconv"):
        yield CheckResult("spconv", Level.WARNING, f"{installed}: {error}", f"{use} will not work; {_pip('spconv')}")
    elif builds == ["spconv"] and shutil.which("nvidia-smi"):
        remedy = "pip uninstall spconv cumm; pip install spconv-cu126==2.3.8"
        yield CheckResult("spconv", Level.WARNING, f"{installed} is the build for CPUs", remedy)
    else:
        fits = _version(builds[0]) == pin
        yield _judge("spconv", fits, installed if fits else f"{installed}; made for {pin}", _pip("spconv"))


def check_triton() -> Iterator[CheckResult]:
    version = _version("triton")
    if version is None:
        yield CheckResult("triton", Level.SKIPPED, "not installed; a CUDA build of torch brings its own")
    else:
        error = _import_error("triton")
        yield _judge("triton", not error, error or version, "reinstall torch with its triton")


def check_submitit() -> Iterator[CheckResult]:
    version = _version("submitit")
    remedy = "`fcmae submit` needs it: pip install submitit"
    yield _judge("submitit", version is not None, version or "not installed", remedy)


def check_slurm() -> Iterator[CheckResult]:
    if absent := [name for name in SLURM if not shutil.which(name)]:
        remedy = "`fcmae run` works without it; to submit, log in to a machine of the cluster, or see tools/devcluster"
        yield CheckResult("slurm", Level.SKIPPED, f"not on PATH: {', '.join(absent)}", remedy)
        return
    options = {"capture_output": True, "text": True, "timeout": SLURM_SECONDS}
    try:
        version = subprocess.run(["sinfo", "--version"], **options)
        partitions = subprocess.run(["sinfo", "-h", "-o", "%P"], **options)
    except subprocess.TimeoutExpired:
        detail = f"slurmctld did not answer within {SLURM_SECONDS} s"
        yield CheckResult("slurm", Level.WARNING, detail, "see `scontrol ping`")
        return
    if "configuration" in partitions.stderr:  # no slurm.conf, and no server that hands one out
        detail = f"{version.stdout.strip() or 'Slurm'} is installed, but no cluster is configured here"
        remedy = "`fcmae run` works without it; SLURM_CONF names a configuration"
        yield CheckResult("slurm", Level.SKIPPED, detail, remedy)
        return
    answered = partitions.returncode == 0
    detail = f"{version.stdout.strip()}, partitions {', '.join(partitions.stdout.split()[:6])}"
    words = re.sub(r"\b(sinfo|slurm_\w+): |\b(error|fatal): ", "", " ".join(partitions.stderr.split()))[:160]
    remedy = "see `scontrol ping`; SLURM_CONF names the configuration"
    yield _judge("slurm", answered, detail if answered else f"no answer from slurmctld ({words})", remedy)


def check_mlflow() -> Iterator[CheckResult]:
    """Look for what a store in a sqlite file needs, without the seconds that importing it takes."""
    version = _version("mlflow-skinny") or _version("mlflow")
    absent = [name for name in ("sqlalchemy", "alembic") if _version(name) is None]
    absent += [] if version else ["mlflow-skinny"]
    error = f"not installed: {', '.join(absent)}" if absent else _import_error("sqlite3")
    remedy = "pip install mlflow-skinny sqlalchemy alembic, or set tracking.mlflow=false"
    yield _judge("mlflow", not error, error or f"{version}, with sqlite", remedy)


def check_stores() -> Iterator[CheckResult]:
    version = _version("s3fs")
    if version is None:
        yield CheckResult("s3", Level.SKIPPED, "s3fs is not installed; only s3:// paths need it", _pip("s3"))
    else:
        yield CheckResult("s3", Level.OK, f"s3fs {version}")


def check_memory() -> Iterator[CheckResult]:
    free = available_memory_bytes() / GIB
    remedy = "free memory: a rank with its FFCV workers needs about 1 GiB, and the model's state"
    yield _judge("memory", free >= MEMORY_GIB, f"{free:.1f} GiB free, {os.cpu_count()} cores", remedy, free)


def check_disks() -> Iterator[CheckResult]:
    for name, folder in (("disk", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / GIB
        remedy = "free space, or set TMPDIR to another folder; ImageNet-1K takes 102 GB at 256 pixels"
        yield _judge(name, free >= DISK_GIB, f"{folder}: {free:.1f} GiB free", remedy, free)
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free / GIB if shared.exists() else 0.0
    remedy = "NCCL and `fcmae prepare` use it: docker run --shm-size=8g"
    yield _judge("/dev/shm", free >= SHARED_MEMORY_GIB, f"{free:.1f} GiB free", remedy, free)


def check_limits() -> Iterator[CheckResult]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    remedy = f"ulimit -n {OPEN_FILES}; for jobs, raise it in /etc/security/limits.conf"
    amount = "unlimited" if unlimited else f"{files:,}"
    yield _judge("open files", unlimited or files >= OPEN_FILES, amount, remedy, files)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    remedy = "InfiniBand needs it unlimited: ulimit -l unlimited, or slurmd's LimitMEMLOCK"
    amount = "unlimited" if unlimited else f"{locked / 2**20:.0f} MiB"
    yield _judge("locked memory", unlimited or not Path("/sys/class/infiniband").exists(), amount, remedy)


def _judge(
    check: str, passed: bool, detail: str, remedy: str, value: float | None = None, otherwise: Level = Level.WARNING
) -> CheckResult:
    """OK, or `otherwise` with the remedy."""
    return CheckResult(check, Level.OK if passed else otherwise, detail, "" if passed else remedy, value)


def _pip(extra: str) -> str:
    return f"pip install 'fcmae[{extra}]'"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned_version(name: str) -> str | None:
    """The version of a package that our extra of the same name requires."""
    for text in importlib.metadata.requires("fcmae") or []:
        required = Requirement(text)
        if required.name == name and required.marker and required.marker.evaluate({"extra": name}):
            return next((part.version for part in required.specifier if part.operator == "=="), None)
    return None


def _import_error(module: str) -> str:
    return _error_of(f"import {module}")


def _error_of(code: str, *arguments: str) -> str:
    return _run(code, *arguments)[1]


def _run(code: str, *arguments: str) -> tuple[str, str]:
    """Run code in a process of its own, because it may crash; returns its output, and its error if there is one."""
    try:
        command = [sys.executable, "-P", "-c", code, *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"took longer than {IMPORT_SECONDS} s"
    if process.returncode == 0:
        return process.stdout, ""
    lines = process.stderr.strip().splitlines()
    return "", lines[-1][:200] if process.returncode > 0 and lines else f"ended with code {process.returncode}"
