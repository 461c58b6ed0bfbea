"""Rehearse the stages of a chain, each in a process of its own and as many at once as there are cores.

Results are kept in the user's cache, because a rehearsal takes long and depends on recipe, ranks and program alone.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cluster.site import Site
from cluster.slurm.gpu_memory_check import check_gpu_memory
from pipeline.distributed.processes import module_command
from pipeline.errors import LaunchError, first_line
from pipeline.recipe import StageRecipe
from pipeline.stage.environment import ROOT
from pipeline.storage.announcement import announced
from pipeline.storage.bounded_files import read_json
from pipeline.storage.folder import write_json
from pipeline.storage.user_cache import user_cache

LIMIT_SECONDS = 900
UNKNOWN = {"parameters": 0, "held": 0, "peak_bytes": 0, "collectives": {}, "save_bytes": 0, "seconds": 0.0,
    "slow": ""}  # fmt: skip


def rehearse_chain(stages: Sequence[StageRecipe], site: Site, rank: int | None = None) -> list[dict[str, Any]]:
    """Rehearse stages on a site; returns the fields of each stage's `StageRehearsal`.

    Args:
        rank: which rank to play; None for the first one, whose shards are the largest.
    """
    requests = [_request(stage, site.for_stage(stage.name), rank) for stage in stages]
    keys = [json.dumps(request, sort_keys=True) for request in requests]
    with (
        announced("rehearsing a rank of each stage without a GPU, once for this recipe, site and program"),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        different = dict(zip(keys, requests, strict=True))
        by_key = dict(zip(different, threads.map(_kept, different.values()), strict=True))
    results = [dict(by_key[key]) for key in keys]
    for stage, result in zip(stages, results, strict=True):
        if not result["problem"] and not result["unknown"]:
            try:
                check_gpu_memory(stage, site.for_stage(stage.name))
            except LaunchError as error:
                result["problem"] = str(error)
    return results


def refuse_failing_stages(stages: Mapping[str, Sequence[StageRecipe]], site: Site) -> None:
    """Rehearse the stages that get GPUs on a site. A rehearsal that breaks off is noted on stderr and refuses nothing.

    Args:
        stages: by what stands before their sentences: the arm of a study, or nothing.

    Raises:
        LaunchError: with the sentence of the first stage that would fail.
    """
    with_gpus = [
        (place, stage) for place, own in stages.items() for stage in own if _has_gpus(stage, site.for_stage(stage.name))
    ]
    results = rehearse_chain([stage for _, stage in with_gpus], site) if with_gpus else []
    notes = {}  # the same one once, with the first arm
    for (place, _), result in zip(with_gpus, results, strict=True):
        if result["problem"]:
            raise LaunchError(f"{place}{result['problem']} (--no-rehearsal submits all the same)")
        if result["slow"]:
            notes.setdefault(result["slow"], place)
        if result["unknown"]:
            notes.setdefault(f"stage {result['stage']} could not be rehearsed: {result['unknown']}", place)
    for note, place in notes.items():
        print(f"note: {place}{note}", file=sys.stderr)


def _has_gpus(stage: StageRecipe, site: Site) -> bool:
    return site.gpus_per_node > 0 and stage.engine.device != "cpu"


def _request(stage: StageRecipe, site: Site, rank: int | None) -> dict[str, Any]:
    # Nothing of a rehearsal depends on where the data is, nor on the seed.
    data = stage.data.model_copy(update={"train": "train.beton", "validation": "validation.beton"})
    return {
        "recipe": stage.model_copy(update={"data": data, "seed": 0}).model_dump_json(),
        "rank": rank or 0,
        "ranks": site.ranks,
        "ranks_per_node": site.ranks_per_node,
        "gpu": _has_gpus(stage, site),
    }


def _kept(request: dict[str, Any]) -> dict[str, Any]:
    """The result of an equal request before, or of a new process."""
    words = json.dumps([request, _program()], sort_keys=True)
    path = user_cache() / "rehearsals" / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        kept = read_json(path)
        if isinstance(kept, dict) and UNKNOWN.keys() | {"problem", "unknown", "stage"} <= kept.keys():
            return kept
    result = _rehearsed(request)
    if not result["unknown"]:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)
    return result


def _rehearsed(request: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = module_command("tools.rehearse.stage_process")
    try:
        process = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS
        )
        return json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        reason = f"it took more than {LIMIT_SECONDS} s"
    except OSError as error:
        reason = f"no process could be started ({error.strerror})"
    except ValueError:
        reason = first_line(RuntimeError((process.stderr.strip().splitlines() or ["it said nothing"])[-1]))
    stage = json.loads(request["recipe"])
    facts = {"stage": stage["name"], "engine": stage["engine"]["kind"], "problem": "", "unknown": reason}
    return {**UNKNOWN, **facts, "rank": request["rank"], "ranks": request["ranks"], "by_formula": True}


def _program() -> list[str]:
    """What a result depends on beside the request: our code and the versions of what it wraps the model in."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    versions = []
    for package in ("torch", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(package))
    return [digest.hexdigest(), *versions]
