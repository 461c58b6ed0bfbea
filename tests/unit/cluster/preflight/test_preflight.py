"""Each check meets the real failure where one can be made here; what only a GPU has is told by its tool's words."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.check_results import CheckResult, Level
from cluster.preflight import Expectations, PreflightSettings, check_node, failure_outcome, gpu, host
from cluster.preflight.gpu import FIELDS, foreign_processes, gpu_health, run_nvidia_smi, slow_ranks
from cluster.preflight.host import available_memory_bytes, is_ours
from cluster.preflight.network import slow_places
from pipeline.stage.outcome import OutcomeKind
from tests.clocks import clock_library

COMMAND = [sys.executable, "-m", "cluster.preflight", "--json"]


def check(stage: Path, scratch: Path | None = None, **settings: float) -> dict[str, CheckResult]:
    expected = Expectations(stage, scratch, settings=PreflightSettings(stray_seconds=0, **settings))
    return {found.check: found for found in check_node(expected)}


def bad(findings: dict[str, CheckResult]) -> dict[str, Level]:
    return {name: found.level for name, found in findings.items() if found.level in (Level.BAD_NODE, Level.MISSING)}


def test_a_good_node_passes_every_check(tmp_path):
    found = check(tmp_path, scratch=tmp_path, disk_gib=0.001, host_memory_gib=0.1)
    assert {name: f.level for name, f in found.items()} == {
        "memory": Level.OK, "processes": Level.OK, "scratch": Level.OK, "run directory": Level.OK, "clock": Level.OK,
        "gpu": Level.SKIPPED, "matrix product": Level.OK,
    }  # fmt: skip
    assert failure_outcome(list(found.values())) is None
    assert found["matrix product"].value > 0
    assert list(tmp_path.iterdir()) == [], "the probes are gone"


@pytest.mark.parametrize(
    ("settings", "failing"),
    [
        ({"matrix_floor_tflops": 1e6}, {"matrix product": Level.BAD_NODE}),
        ({"host_memory_gib": 1e6}, {"memory": Level.BAD_NODE}),
        ({"disk_gib": 1e9}, {"scratch": Level.BAD_NODE, "run directory": Level.MISSING}),
    ],
)
def test_what_this_machine_cannot_give_is_found(tmp_path, settings, failing):
    found = check(tmp_path, scratch=tmp_path, **{"disk_gib": 0.0, "host_memory_gib": 0.0, **settings})
    assert bad(found) == failing
    outcome = failure_outcome(list(found.values()))
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert f"on {socket.gethostname()}: " in outcome.reason


def test_a_disk_that_does_not_answer_is_found(tmp_path, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(host, "probe_disk", lambda *_, **__: answers.wait())
    try:
        found = check(tmp_path, scratch=tmp_path, disk_timeout_seconds=0.1)
    finally:
        answers.set()
    assert bad(found) == {"scratch": Level.BAD_NODE, "run directory": Level.BAD_NODE}
    assert "did not take 4 MiB within 0.1 s" in found["scratch"].detail


def test_a_full_run_directory_is_nobodys_node(tmp_path):
    outcome = failure_outcome(list(check(tmp_path, disk_gib=1e9).values()))
    assert outcome.kind is OutcomeKind.PERMANENT
    assert "1e+09 GiB needed" in outcome.reason


def mounted(folder: Path, mount: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command where `folder` is what `mount` made of it, in a mount namespace of its own."""
    folder.mkdir(exist_ok=True)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} || exit 99; shift; exec "$@"']
    return subprocess.run([*command, "sh", folder, *map(str, arguments)], capture_output=True, text=True, timeout=300)


FULL = 'mount -t tmpfs -o size=64k none "$1" && { head -c 1m /dev/zero >"$1/x" 2>/dev/null; test -s "$1/x"; }'
READ_ONLY = 'mount -t tmpfs -o ro none "$1"'
# mount needs a namespace that some kernels refuse to users.
no_mounts = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode


@pytest.mark.skipif(no_mounts, reason="this kernel lets users make no mount namespaces")
@pytest.mark.parametrize(
    ("place", "mount", "code", "words"),
    [
        ("--scratch", FULL, 76, "No space left on device"),
        ("--run", FULL, 1, "No space left on device"),
        ("--run", READ_ONLY, 76, "Read-only file system"),
    ],
)
def test_full_and_read_only_mounts(tmp_path, place, mount, code, words):
    folder = tmp_path / "mounted"
    other = ["--run", tmp_path] if place == "--scratch" else []
    ran = mounted(folder, mount, *COMMAND, place, folder, *other, "--settings", '{"disk_gib": 0}')
    assert ran.returncode == code, ran.stderr
    (found,) = [f for f in json.loads(ran.stdout) if f["level"] in ("bad node", "missing")]
    assert words in found["detail"]
    assert str(folder) in found["detail"]


@pytest.mark.skipif(os.geteuid() == 0 and no_mounts != 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_nobodys_node(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # Root loses its power over others' files with its capabilities.
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    ran = subprocess.run([*drop, *COMMAND, "--run", closed], capture_output=True, text=True, timeout=300)
    (found,) = [f for f in json.loads(ran.stdout) if f["level"] not in ("ok", "skipped")]
    assert (ran.returncode, found["check"], found["level"]) == (1, "run directory", "missing")
    assert "Permission denied" in found["detail"]


def test_a_wrong_clock_is_found(tmp_path):
    (tmp_path / "shift.0").write_text("90")
    clock = {"LD_PRELOAD": str(clock_library(tmp_path)), "FCMAE_TEST_CLOCK": f"{tmp_path}/shift"}
    began = time.monotonic()
    ran = subprocess.run(
        [*COMMAND, "--run", tmp_path, "--settings", '{"disk_gib": 0, "clock_seconds": 60}'],
        env={**os.environ, **clock}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    (found,) = [f for f in json.loads(ran.stdout) if f["check"] == "clock"]
    assert (ran.returncode, found["level"]) == (0, "warning"), ran.stdout
    assert 60 < found["value"] <= 90 + time.monotonic() - began  # and what passes between the two readings
    assert "ahead of the shared file system's" in found["detail"]


# -- who else is here


@pytest.fixture
def rank_of(tmp_path: Path, request) -> Callable[..., subprocess.Popen]:
    """Starts a process that looks like a rank of the stage in tmp_path, as `ps` shows it."""

    def start(seconds: float = 3600, **environment: str) -> subprocess.Popen:
        words = [sys.executable, "-c", f"import time; print(1, flush=True); time.sleep({seconds})", "pipeline.run"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        process = subprocess.Popen([*words, str(tmp_path)], env={**clean, **environment}, stdout=subprocess.PIPE)
        request.addfinalizer(process.wait)
        request.addfinalizer(process.kill)
        process.stdout.readline()  # it is what it will be from exec on
        return process

    return start


def test_a_rank_of_an_earlier_start_is_found(tmp_path, rank_of, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    rank_of(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert check(tmp_path)["processes"].level is Level.OK, "a rank beside us"
    old = rank_of(SLURM_JOB_ID="7")
    other = rank_of(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    found = check(tmp_path)["processes"]
    assert (found.level, found.value) == (Level.BAD_NODE, 2)
    assert f"{old.pid} (" in found.detail
    assert f"{other.pid} (" in found.detail
    assert check(tmp_path.parent / "another")["processes"].level is Level.OK, "another stage's"


def test_outside_slurm_a_rank_of_another_launcher_is_found(tmp_path, rank_of, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    rank = rank_of()
    assert check(tmp_path)["processes"].level is Level.BAD_NODE
    assert not is_ours(psutil.Process(rank.pid))
    assert is_ours(psutil.Process())


def test_an_earlier_rank_may_take_a_moment_to_end(tmp_path, rank_of):
    rank_of(seconds=0.3)
    expected = Expectations(tmp_path, settings=PreflightSettings(stray_seconds=20, disk_gib=0))
    assert {f.check: f.level for f in check_node(expected)}["processes"] is Level.OK


def test_memory_is_that_of_this_machine_or_less():
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total


# -- what only a GPU has


UUIDS = {"aaaa", "bbbb"}


def health(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CheckResult]:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    patience = 1 if "sleep" in script else 60
    return list(gpu_health(run_nvidia_smi("--query-gpu=" + ",".join(FIELDS), timeout_seconds=patience), UUIDS))


@pytest.mark.parametrize(
    ("script", "level", "words"),
    [
        ("echo 'GPU-aaaa, 0, No, No'; echo 'GPU-bbbb, 0, No, No'", Level.OK, "no uncorrected"),
        ("echo 'GPU-aaaa, [N/A], [N/A], [N/A]'", Level.OK, "no uncorrected"),
        ("echo 'GPU-bbbb, 3, No, No'", Level.BAD_NODE, "bbbb: 3 uncorrected memory errors"),
        ("echo 'GPU-aaaa, 0, Yes, No'", Level.BAD_NODE, "wait for a reset"),
        ("echo 'GPU-aaaa, 0, No, Yes'", Level.BAD_NODE, "could not be remapped"),
        ("echo 'GPU-cccc, 9, Yes, Yes'", Level.OK, "no uncorrected"),  # another job's
        ("echo 'GPU-aaaa, 0, No, No'; echo 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0'", Level.OK, "no uncor"),
        ("echo 'Unable to determine the device handle for GPU0: Unknown Error'; exit 9", Level.BAD_NODE, "handle"),
        ("echo 'Field \"remapped_rows.pending\" is not a valid field to query.'; exit 2", Level.SKIPPED, "not a valid"),
        ("exec sleep 30", Level.BAD_NODE, "did not answer within 1 s"),
    ],
)
def test_what_nvidia_smi_says(tmp_path, monkeypatch, script, level, words):
    (found,) = health(script, tmp_path, monkeypatch)
    assert found.level is level
    assert words in found.detail


def test_without_nvidia_smi_health_is_skipped():
    assert [f.level for f in gpu_health(None, UUIDS)] == [Level.SKIPPED]


def test_processes_of_others_on_our_gpus(rank_of, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    ours, other = rank_of(SLURM_JOB_ID="7"), rank_of(SLURM_JOB_ID="8")
    table = (
        f"{ours.pid}, python, GPU-aaaa\n{other.pid}, python, GPU-aaaa\n4194305, [Not Found], GPU-bbbb\n"
        "12, /usr/bin/nvidia-cuda-mps-server, GPU-aaaa\n13, python, GPU-cccc\n[N/A], a, b, GPU-aaaa\nWARNING: infoROM\n"
    )
    others = foreign_processes(table, UUIDS, PreflightSettings().allowed_processes)
    assert others == [f"{other.pid} (python)", "4194305 ([Not Found])", "[N/A] (a, b)"]


def test_gpus_are_expected_of_a_torch_that_knows_them(tmp_path):
    import torch

    expected = Expectations(tmp_path, devices=torch.cuda.device_count() + 1)
    findings = check_node(expected)
    assert failure_outcome(findings).kind is (OutcomeKind.BAD_NODE if torch.version.cuda else OutcomeKind.PERMANENT)


@pytest.mark.parametrize(
    ("visible", "ranks", "level"), [(1, 4, Level.OK), (4, 4, Level.OK), (8, 4, Level.OK), (3, 4, Level.BAD_NODE),
                                    (1, 1, Level.BAD_NODE), (0, 4, Level.BAD_NODE)]
)  # fmt: skip
def test_one_gpu_for_each_task_is_enough(tmp_path, monkeypatch, visible, ranks, level):
    """A cluster's filter, or SLURM_TRES_PER_TASK, shows each task its own GPU as number 0."""
    import torch

    used = []
    health = "GPU-aaaa, 0, No, No"
    monkeypatch.setattr(gpu, "run_nvidia_smi", lambda query: subprocess.CompletedProcess([], 0, health, ""))
    monkeypatch.setattr(gpu, "matrix_product", lambda device: (used.append(device.index), (1.0, True))[1])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="aaaa"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (used.append(number), (1, 1))[1])
    monkeypatch.setattr(gpu, "foreign_processes", lambda *_: [])
    found = list(gpu.check_gpu(Expectations(tmp_path, devices=4, local_rank=ranks - 1, ranks=ranks)))
    assert found[0].level is level
    assert [f.level for f in found[1:]] == ([Level.OK] * 4 if level is Level.OK else [])
    assert used == ([0 if visible == 1 else 3] * 2 if level is Level.OK else [])


# -- the rules


def test_ranks_are_compared_with_the_others():
    assert slow_ranks([600, 590, 300, 610], 0.7) == {2: 600}
    assert slow_ranks([600, 590, 580], 0.7) == {}
    assert slow_ranks([100.0], 0.7) == {}
    assert slow_ranks([1.0, 2.0], 1.0) == {0: 2.0}


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=9), st.floats(0, 0.99))
def test_the_fastest_rank_is_never_slow(tflops, fraction):
    slow = slow_ranks(tflops, fraction)
    assert tflops.index(max(tflops)) not in slow
    assert all(tflops[rank] < fraction * median for rank, median in slow.items())


def test_a_place_is_slow_when_both_its_links_are():
    assert slow_places([9, 9, 9, 9], 5) == []
    assert slow_places([9, 1, 1, 9], 5) == [2]  # the links 1-2 and 2-3
    assert slow_places([9, 1, 9, 9], 5) == []  # one link alone blames neither end
    assert slow_places([1, 1], 5) == [0, 1]


def test_settings_are_strict():
    assert PreflightSettings.model_validate_json('{"matrix_floor_tflops": 300, "allowed_processes": ["x"]}')
    for wrong in ({"matrix_flor_tflops": 1.0}, {"matrix_fraction": 2.0}, {"disk_gib": "1"}, {"clock_seconds": 0}):
        with pytest.raises(ValidationError):
            PreflightSettings(**wrong)


def test_the_site_may_switch_it_off(tmp_path):
    settings = PreflightSettings(enabled=False, matrix_floor_tflops=1e9)
    (only,) = check_node(Expectations(tmp_path / "absent", settings=settings))
    assert only.level is Level.SKIPPED
