"""What a run was made by: code, interpreter, packages, machine. Noted in the journal, for whoever repeats it."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SNAPSHOT = "environment.json"  # in a copy of the code: what it was when it was made
ROOT = Path(__file__).parents[2]


def software() -> dict[str, Any]:
    """The interpreter and the version of every package it sees."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "interpreter": sys.executable,
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items())),
    }


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The git commit of the code, and how many of its files differ from it; empty outside of a checkout."""
    if (root / SNAPSHOT).is_file():
        return json.loads((root / SNAPSHOT).read_text()).get("commit", {})
    if not (root / ".git").exists():  # a checkout around the installed package would be somebody else's
        return {}
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        return {"sha": head, "changed_files": len(_git(root, "status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def machine() -> dict[str, Any]:
    """This node's processor, memory and GPUs, as far as it tells. Imports torch."""
    import torch

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["driver"] = _first(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version"))
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _first(pattern: str, path: Path) -> str | None:
    try:
        match = re.search(pattern, path.read_text())
    except OSError:
        return None
    return match[1].strip() if match else None
