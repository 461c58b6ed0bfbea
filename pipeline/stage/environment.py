"""Describe what a run is made with: code, interpreter, packages and machine. The journal records it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.storage.file_names import RECIPE_FILE
from pipeline.storage.run_records import read_record

SNAPSHOT = "environment.json"  # in a copy of the code: commit and packages at the time of the copy
ROOT = Path(__file__).parents[2]
CODE = "FCMAE_CODE"  # environment variable with the folder that processes of a run take this code from


def describe_software() -> dict[str, Any]:
    """The interpreter and the versions of all packages that it can import."""
    return {"interpreter": sys.executable, "python": platform.python_version(), "packages": dict(_packages())}


@cache  # each has a long text that must be parsed
def _packages() -> tuple[tuple[str, str], ...]:
    """Names and versions of the packages that this interpreter can import, in order."""
    found = {about["Name"]: about["Version"] for about in (d.metadata for d in importlib.metadata.distributions())}
    return tuple(sorted(found.items()))


def describe_commit(root: Path = ROOT) -> dict[str, Any]:
    """The git commit of the code, and how many of its files differ from it; empty outside of a checkout."""
    if (root / SNAPSHOT).is_file():
        commit = read_record(root / SNAPSHOT).get("commit")
        return commit if isinstance(commit, dict) else {}
    if not (root / ".git").exists():  # a checkout around an installed package is another project's
        return {}
    try:
        head = _git(root, "rev-parse", "HEAD").strip()
        return {"sha": head, "changed_files": len(_git(root, "status", "--porcelain").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return {}


def program_id(stage_directory: Path) -> str:
    """A hash of what a stage executes: its recipe with all operational choices, and the code, by its commit or by the
    name of its copy."""
    recipe, code = (stage_directory / RECIPE_FILE).read_bytes(), json.dumps([ROOT.name, describe_commit()])
    return hashlib.sha256(recipe + code.encode()).hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def describe_machine() -> dict[str, Any]:
    """Processor, memory and GPUs of this node, as far as they are known. Imports torch."""
    import torch

    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _first_match(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["driver"] = _first_match(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version"))
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _first_match(pattern: str, path: Path) -> str | None:
    try:
        match = re.search(pattern, path.read_text())
    except OSError:
        return None
    return match[1].strip() if match else None
