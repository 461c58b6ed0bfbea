"""Check that a node's GPUs are visible, healthy and unused, and that a matrix product is exact and fast."""

import csv
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from cluster.check_results import CheckResult, Level
from cluster.preflight.host import GIB, is_ours
from cluster.preflight.settings import Expectations

if TYPE_CHECKING:
    import torch

MATRIX = "matrix product"
# Xid errors of hardware, by NVIDIA's catalogue: memory, NVLink, a GPU that has fallen off the bus, its own processor.
HARDWARE_XIDS = {48, 62, 64, 74, 79, 94, 95, 110, 119, 120, 140}
XID = re.compile(r"^\[\s*([\d.]+)\] .*?(NVRM: Xid \([^)]*\): (\d+).*)$", re.MULTILINE)
FIELDS = ("uuid", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")


def check_gpu(expected: Expectations) -> Iterator[CheckResult]:
    """Run the checks of this module; for training on CPUs the matrix product alone."""
    if not expected.devices:
        yield CheckResult("gpu", Level.SKIPPED, "training on CPUs")
        yield from _matrix(expected)
        return
    import torch

    seen = torch.cuda.device_count()
    own = expected.gpu(seen)
    if not torch.version.cuda:
        remedy = "install a CUDA build of torch, see docs/install.md"
        yield CheckResult("gpu", Level.MISSING, "this torch is built for CPUs only", remedy, 0)
    elif own is None:
        detail = f"{seen} visible, {expected.devices} expected"
        yield CheckResult("gpu", Level.BAD_NODE, detail, "look at `nvidia-smi` there", seen)
    else:
        yield CheckResult("gpu", Level.OK, f"{seen} visible", value=seen)
        try:
            visible = {_uuid(torch.cuda.get_device_properties(i).uuid) for i in range(seen)}
            yield from gpu_health(run_nvidia_smi("--query-gpu=" + ",".join(FIELDS)), visible)
            yield from _memory(expected, own)
            yield from _processes(expected, visible)
            yield from _matrix(expected, own)
        except RuntimeError as error:  # every error of CUDA, also lack of memory
            detail = f"GPU {own}: {str(error).splitlines()[0]}"
            yield CheckResult("gpu", Level.BAD_NODE, detail, "reset the GPU or restart the node")


def gpu_health(
    answer: subprocess.CompletedProcess[str] | None, visible: set[str] | None = None
) -> Iterator[CheckResult]:
    """Check the memory errors that nvidia-smi reports of the visible GPUs, or of all. Xid errors are only in the
    kernel's log, which users may rarely read; after the severe ones nvidia-smi or CUDA cannot reach the GPU."""
    if answer is None:
        yield CheckResult("gpu health", Level.SKIPPED, "no nvidia-smi on PATH")
        return
    if answer.returncode != 0:
        message = " ".join((answer.stdout + answer.stderr).split())[:200] or "no answer"
        if "not a valid field" in message:
            yield CheckResult("gpu health", Level.SKIPPED, f"nvidia-smi: {message}")
        else:
            remedy = "reset the GPU or restart the node"
            yield CheckResult("gpu health", Level.BAD_NODE, f"nvidia-smi: {message}", remedy)
        return
    troubles = []
    for row in csv.reader(answer.stdout.splitlines(), skipinitialspace=True):
        if len(row) != len(FIELDS) or (visible is not None and _uuid(row[0]) not in visible):
            continue  # such as "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"
        uuid, uncorrected, pending, failure = row
        if uncorrected.isdigit() and int(uncorrected):
            troubles.append(f"{uuid}: {uncorrected} uncorrected memory errors since the driver was loaded")
        if pending == "Yes":
            troubles.append(f"{uuid}: memory rows wait for a reset to be remapped")
        if failure == "Yes":
            troubles.append(f"{uuid}: a memory row could not be remapped")
    if troubles:
        yield CheckResult(
            "gpu health", Level.BAD_NODE, "; ".join(troubles), "reset the GPU; if it comes back, replace it"
        )
    else:
        yield CheckResult("gpu health", Level.OK, "no uncorrected memory error")


def hardware_evidence(since_seconds: float) -> list[str]:
    """What nvidia-smi and, where users may read it, the kernel's log say against this node's GPUs.

    Args:
        since_seconds: leave out older lines of the log, in seconds since the machine was started.
    """
    results = gpu_health(run_nvidia_smi("--query-gpu=" + ",".join(FIELDS)))
    troubles = [result.detail for result in results if result.level is Level.BAD_NODE]
    try:
        log = subprocess.run(["dmesg"], capture_output=True, timeout=30, check=False).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return troubles
    for seconds, line, number in XID.findall(log):
        if int(number) in HARDWARE_XIDS and float(seconds) >= since_seconds:
            troubles.append(f"the kernel's log has {line[:120]}")
    return troubles


def run_nvidia_smi(query: str, timeout_seconds: float = 30) -> subprocess.CompletedProcess[str] | None:
    """Run nvidia-smi. A hang counts as a failed run; None if there is no such program."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"did not answer within {timeout_seconds:.0f} s")


def _memory(expected: Expectations, gpu: int) -> Iterator[CheckResult]:
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(gpu)
    fraction, needed = free_bytes / total_bytes, expected.settings.device_memory_fraction
    detail = f"GPU {gpu}: {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
    if fraction >= needed:
        yield CheckResult("gpu memory", Level.OK, detail, value=fraction)
    else:
        remedy = "a dead process may hold it: see `nvidia-smi`, reset the GPU"
        yield CheckResult("gpu memory", Level.BAD_NODE, f"{detail}, {needed:.0%} needed", remedy, fraction)


def _processes(expected: Expectations, visible: set[str]) -> Iterator[CheckResult]:
    answer = run_nvidia_smi("--query-compute-apps=pid,process_name,gpu_uuid")
    if answer is None or answer.returncode != 0:
        yield CheckResult("gpu processes", Level.SKIPPED, "nvidia-smi does not list them")
    elif others := foreign_processes(answer.stdout, visible, expected.settings.allowed_processes):
        detail = f"others compute on our GPUs: {', '.join(others)}"
        remedy = "end them, or ask for whole nodes (exclusive)"
        yield CheckResult("gpu processes", Level.BAD_NODE, detail, remedy, len(others))
    else:
        yield CheckResult("gpu processes", Level.OK, "no other processes", value=0)


def foreign_processes(table: str, visible: set[str], allowed: list[str]) -> list[str]:
    """List the processes in nvidia-smi's table that use a visible GPU and are neither of our job nor allowed, as
    `pid (name)`."""
    others = []
    for row in csv.reader(table.splitlines(), skipinitialspace=True):
        if len(row) < 3 or _uuid(row[-1]) not in visible:
            continue
        pid, name = row[0], ", ".join(row[1:-1])  # nvidia-smi does not quote a name with a comma
        if any(part in name for part in allowed):
            continue
        try:
            if is_ours(psutil.Process(int(pid))):
                continue
        except (psutil.Error, ValueError):  # another user's, or outside of our container; [N/A] in place of a number
            pass
        others.append(f"{pid} ({name})")
    return others


def _uuid(text: object) -> str:
    return str(text).removeprefix("GPU-")


def _matrix(expected: Expectations, gpu: int = 0) -> Iterator[CheckResult]:
    import torch

    device = torch.device("cuda", gpu) if expected.devices else torch.device("cpu")
    floor = expected.settings.matrix_floor_tflops
    tflops, repeatable = matrix_product(device)
    detail = f"{tflops:.3g} TFLOP/s on {device}"
    if not repeatable:
        detail = f"{device}: the same product twice gave different numbers"
        yield CheckResult(MATRIX, Level.BAD_NODE, detail, "take the node out: its arithmetic is broken", tflops)
    elif tflops < floor:
        remedy = "see its clocks and temperature, and what else runs there"
        yield CheckResult(MATRIX, Level.BAD_NODE, f"{detail}, {floor:g} needed", remedy, tflops)
    else:
        yield CheckResult(MATRIX, Level.OK, detail, value=tflops)


def matrix_product(device: "torch.device") -> tuple[float, bool]:
    """Multiply a square matrix by itself (bf16 on a GPU, float32 on a CPU), in about 0.1 s.

    Returns:
        TFLOP/s, the best of five; and whether the product repeats to the bit.
    """
    import torch

    cuda = device.type == "cuda"
    size = 8192 if cuda else 512
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator).to(device, torch.bfloat16 if cuda else torch.float32)
    first = matrix @ matrix
    best = float("inf")
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        again = matrix @ matrix
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12, torch.equal(first, again)


def slow_ranks(tflops: list[float], fraction: float) -> dict[int, float]:
    """The ranks below `fraction` of the median of the other ranks, with that median."""
    slow = {}
    for rank, own in enumerate(tflops):
        others = tflops[:rank] + tflops[rank + 1 :]
        if others and own < fraction * (median := statistics.median(others)):
            slow[rank] = median
    return slow
