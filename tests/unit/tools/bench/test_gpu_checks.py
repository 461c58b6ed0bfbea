"""`python -m tools.bench.gpu` without a GPU: every check runs at tiny sizes, and the program around them."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tools.bench.gpu import check_process, step_checks
from tools.bench.gpu.__main__ import main
from tools.bench.gpu.check_process import MESSAGE, run_check
from tools.bench.gpu.check_table import CHECKS, PART_SECONDS, Bench, Row, TimedCheck
from tools.bench.gpu.results_page import markdown, plan_lines, read_results, write_results

REPOSITORY = Path(__file__).resolve().parents[4]
# In one process, because each import of torch and of the engines takes seconds.
ALL = """
import json, pathlib, sys, torch
from dataclasses import asdict
from tools.bench.gpu.check_table import CHECKS, Bench, CheckSkippedError
torch.set_num_threads(1)
for check in CHECKS:
    if check.name not in sys.argv[2:]:
        continue
    rows, folder = [], pathlib.Path(sys.argv[1]) / check.module
    folder.mkdir(exist_ok=True)
    try:
        rows += map(asdict, check.run(Bench(torch.device("cpu"), True, folder)))
    except CheckSkippedError as skipped:
        rows = str(skipped)
    print(json.dumps([check.name, rows]), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""
# Before the program, on a machine that has torch alone: recipes and timm cannot be imported.
BARE = """
import importlib.util, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "omegaconf", "yaml", "ffcv", "deepspeed", "timm", "numba", "fsspec"):
            raise ModuleNotFoundError(f"No module named {name!r}")

def find_spec(name, package=None, find=importlib.util.find_spec):
    try:
        return find(name, package)
    except ModuleNotFoundError:
        return None

sys.meta_path.insert(0, Absent())
importlib.util.find_spec = find_spec
"""
# Stands in for a tool that is not here, and finds nothing.
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
"""


def rows_of(checks: list[str], folder: Path, before: str = "") -> dict[str, list[dict] | str]:
    """The rows of each check, or why it was skipped."""
    tool = folder / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{folder}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", before + ALL, str(folder), *checks], cwd=REPOSITORY, env=environment,
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict] | str]:
    return rows_of([check.name for check in CHECKS], tmp_path_factory.mktemp("checks"))


@pytest.mark.slow
def test_with_torch_alone_steps_are_bare_loops_and_the_rest_says_what_is_missing(tmp_path):
    rows = rows_of(["fcmae eager", "engines", "timm step"], tmp_path, BARE)
    assert rows["engines"] == "pydantic is not installed"
    assert rows["timm step"] == "timm is not installed"
    building, *others = rows["fcmae eager"]
    assert building["note"].startswith("a bare torch loop")
    assert {"eager: step", "eager: counted operations", "host waits within a step"} <= {row["what"] for row in others}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_gives_rows_that_are_right(check, found):
    rows = found[check.name]
    assert rows, "no row"
    assert not isinstance(rows, str), rows
    assert not [row for row in rows if Row(**row).is_wrong]
    assert check.is_correctness == any(row["limit"] is not None for row in rows)


def test_halves_end_within_their_time_and_begin_with_correctness():
    for part in (1, 2):
        checks = [check for check in CHECKS if check.part == part]
        assert sum(check.seconds for check in checks) <= PART_SECONDS
        kinds = [check.is_correctness for check in checks]
        assert kinds == sorted(kinds, reverse=True)
        assert kinds[0]
        assert len(plan_lines([part])) == len(checks) + 1


def run(code: str, tmp_path: Path, check: TimedCheck = CHECKS[0], show: Callable[[Row], None] | None = None):
    """The result of a check that is this program, and the rows as they came."""
    shown: list[Row] = []
    code = f"import sys, time\ndef send(text): print({MESSAGE!r} + text, flush=True)\n{code}"
    return run_check(check, 300.0, [sys.executable, "-c", code], tmp_path / "log", show or shown.append), shown


ROW = """send('{"row": {"what": "error", "value": %s, "unit": "", "limit": 0.5}}')"""


@pytest.mark.parametrize(("value", "failed"), [("0.5", False), ("0.6", True), ("NaN", True), ("Infinity", True)])
def test_a_wrong_figure_fails_and_a_right_one_does_not(value, failed, tmp_path):
    result, shown = run(ROW % value, tmp_path)
    assert (result.failed, result.trouble, len(shown)) == (failed, "", 1)


@pytest.mark.parametrize("check", [CHECKS[0], CHECKS[1]], ids=["correctness", "speed"])
def test_what_fails_or_hangs_is_a_sentence_and_keeps_its_rows(check, tmp_path, monkeypatch):
    broken, shown = run(ROW % "0" + "\nprint('noise')\nsys.exit('ValueError: it broke')", tmp_path, check=check)
    assert (broken.trouble, len(shown)) == ("ValueError: it broke", 1)
    now = [0.0]
    monkeypatch.setattr(check_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    hanging, _ = run(ROW % "0" + "\ntime.sleep(600)", tmp_path, check, lambda row: now.append(now.pop() + 301.0))
    assert (hanging.trouble, len(hanging.rows)) == ("it was ended at its limit of 300 s", 1)
    silent, _ = run("", tmp_path, check=check)
    assert silent.trouble == "it gave no row"
    assert broken.failed is hanging.failed is silent.failed is check.is_correctness


def test_a_check_that_is_complete_is_not_blamed_for_the_end_of_its_process(tmp_path):
    """Threads of torch and NCCL sometimes abort a process that ends."""
    code = ROW % "0" + """\nsend('{"complete": true}')\nimport os\nos.abort()"""
    result, _ = run(code, tmp_path)
    assert (result.trouble, result.failed, len(result.rows)) == ("", False, 1)


def test_half_of_the_images_have_the_memory_that_all_of_them_took(tmp_path, monkeypatch):
    models = []

    class Model(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(models) == 1:
                raise torch.OutOfMemoryError("the memory is full")
            return super().forward(images.mean((2, 3)))

    def create(name: str, num_classes: int) -> nn.Module:
        assert not any(model() for model in models)
        model = Model(3, num_classes)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(step_checks, "import_timm", lambda: SimpleNamespace(create_model=create, __version__="0"))
    rows = list(step_checks.check_timm_step(Bench(torch.device("cpu"), True, tmp_path)))
    assert len(models) == 2
    assert rows[0].what == "timm 0, 64 px x 1, eager: step"


def test_a_skipped_check_is_no_fault(tmp_path):
    result, _ = run("""send('{"skipped": "pydantic is not installed"}')""", tmp_path)
    assert (result.trouble, result.skipped, result.failed) == ("pydantic is not installed", True, False)
    write_results(tmp_path, 1, [result])
    assert "kernels, 0 s: skipped, pydantic is not installed" in markdown(tmp_path)


def test_the_section_has_both_parts(tmp_path):
    for part, value in ((1, "0.25"), (2, "7")):
        result, _ = run("""send('{"machine": {"gpu": "a GPU", "torch": "2"}}')\n""" + ROW % value, tmp_path)
        write_results(tmp_path, part, [result])
    assert [row.value for result in read_results(tmp_path) for row in result.rows] == [0.25, 7.0]
    text = markdown(tmp_path)
    assert text.startswith("## What does one GPU reach?\n")
    assert "a GPU, torch 2. Predictions" in text
    assert "| error | 0.25  |  | right: at most 0.5 |" in text
    assert "| error | 7  |  | WRONG: at most 0.5 |" in text


@pytest.mark.parametrize("options", [[], ["--dry-run", "--device", "cpu"]])
def test_without_a_gpu_or_on_request_it_says_what_it_would_do(options, tmp_path, capsys):
    if not options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "this would run:\n--part 1: at most 300 s of 300\n" in printed
    assert all(check.measures in printed for check in CHECKS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_program_on_a_cpu(tmp_path):
    options = ["--out", tmp_path, "--device", "cpu", "--tiny", "--only", "kernels", "peaks", "engines"]
    command = [sys.executable, "-m", "tools.bench.gpu", *map(str, options)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_results(tmp_path)
    assert [(result.name, result.trouble) for result in results] == [("kernels", ""), ("peaks", ""), ("engines", "")]
    assert (tmp_path / "section.md").read_text() in done.stdout
