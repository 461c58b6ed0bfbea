"""The checks of `fcmae doctor` on this machine, and where something is hidden, broken or scarce."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.check_results import CheckResult, Level, results_table
from tools import doctor

ROOT = Path(__file__).resolve().parents[3]


def examine(monkeypatch: pytest.MonkeyPatch, check, **environment: str) -> list[CheckResult]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return list(check())


def shadow(folder: Path, module: str, source: str) -> str:
    """A PYTHONPATH on which `source` replaces `module`."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)
    return os.pathsep.join([str(folder), str(ROOT)])


def test_the_whole_command_where_ffcv_is_broken(tmp_path):
    broken = shadow(tmp_path, "ffcv", "")
    (tmp_path / "ffcv" / "_libffcv.so").write_bytes(b"no library")
    # Slow imports are hidden too, to be quick.
    for module in ("torch", "triton"):
        shadow(tmp_path, module, f"raise ImportError('no {module} today')")
    ran = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "-", sys.executable, "-m", "tools.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": broken}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr == ""
    found = {f["check"]: f for f in json.loads(ran.stdout)}
    assert (found["ffcv"]["level"], found["torch"]["level"]) == ("missing", "missing")
    assert "_libffcv.so" in found["ffcv"]["detail"]
    assert "libturbojpeg0" in found["ffcv"]["remedy"]
    assert "no torch today" in found["torch"]["detail"]
    assert (found["python"]["level"], found["open files"]["level"]) == ("ok", "warning")
    assert all(f["remedy"] for f in found.values() if f["level"] in ("warning", "missing"))


def test_kernels_are_compiled_where_ranks_look_for_them(monkeypatch, tmp_path):
    """Ranks keep compiled code on the node, not in the home directory."""
    monkeypatch.setenv("FCMAE_SCRATCH", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_DEFAULT_FP_FUSION"):
        monkeypatch.setenv(name, "")  # so that the test's end removes what is set here
    places = []
    monkeypatch.setattr(
        "pipeline.cost.measure.measure_steps", lambda *_, **__: places.append(os.environ["TRITON_CACHE_DIR"])
    )
    doctor._compile_kernels()
    assert places == [str(tmp_path / "fcmae" / "triton")]


def test_a_crash_while_importing_is_survived(monkeypatch, tmp_path):
    path = shadow(tmp_path, "torch", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (found,) = examine(monkeypatch, doctor.check_torch, PYTHONPATH=path)
    assert (found.level, found.detail) == (Level.MISSING, "ended with code -11")


def test_torchvision_of_another_build_is_named_with_what_to_do(monkeypatch, tmp_path):
    """PyPI's torchvision is built for CUDA, and beside a torch for CPUs `import timm` fails."""
    path = shadow(tmp_path, "torchvision", "")
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"no library")
    shadow(tmp_path, "torch", "class cuda: is_available = staticmethod(lambda: False)\n"
           "class version: cuda = None\n__version__ = '2.13.0+cpu'")  # fmt: skip
    monkeypatch.setattr(doctor, "_version", lambda name: "0.28.0")
    torch, vision = examine(monkeypatch, doctor.check_torch, PYTHONPATH=path)
    assert (torch.check, torch.detail.partition(",")[0]) == ("torch", "2.13.0+cpu")
    assert (vision.level, vision.check) == (Level.SKIPPED, "torchvision")  # no warning: users do not need it
    assert "is of another build than torch 2.13.0+cpu" in vision.detail
    assert "--index-url https://download.pytorch.org/whl/cpu torchvision" in vision.remedy


def test_optional_packages_are_compared_with_our_pins(monkeypatch, tmp_path):
    pins = {"0.1.0": "s3", "0.19.8": "deepspeed"}
    wanted = "".join(f'Requires-Dist: deepspeed=={pin}; extra == "{extra}"\n' for pin, extra in pins.items())
    for name, version, rest in (("deepspeed", "0.9.0", ""), ("fcmae", "0.1.0", wanted)):
        metadata = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{rest}")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = doctor.check_deepspeed()
    assert found.level is Level.WARNING
    assert "0.9.0; engine.kind: deepspeed is made for 0.19.8" in found.detail
    assert "fcmae[deepspeed]" in found.remedy


def test_slurm_absent_dead_and_mute(monkeypatch, tmp_path):
    (found,) = examine(monkeypatch, doctor.check_slurm, PATH=str(tmp_path))
    assert found.level is Level.SKIPPED
    for name in doctor.SLURM:
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    (found,) = doctor.check_slurm()
    assert found.level is Level.WARNING
    assert "Unable to contact" in found.detail
    (tmp_path / "sinfo").write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo slurm-wlm 22.05.8 && exit\n"
        "echo 'sinfo: error: fetch_config: DNS SRV lookup failed' >&2\n"
        "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1\n"
    )
    (found,) = doctor.check_slurm()
    assert found.level is Level.SKIPPED
    assert found.detail == "slurm-wlm 22.05.8 is installed, but no cluster is configured here"


def test_limits_are_those_of_this_process():
    found = {f.check: f for f in doctor.check_limits()}
    assert found["open files"].value == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    disks = {f.check for f in doctor.check_disks()}
    assert disks == {"disk", "temporary files", "/dev/shm"}


def test_the_table_has_a_line_for_each_finding_and_its_remedy():
    from rich.console import Console

    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(
        results_table([CheckResult("a", Level.OK, "fine"), CheckResult("b", Level.MISSING, "[x] gone", "get [b] now")])
    )
    assert [line.split() for line in console.export_text().splitlines()[1:]] == [
        ["a", "ok", "fine"], ["b", "missing", "[x]", "gone"], ["get", "[b]", "now"],
    ]  # fmt: skip
