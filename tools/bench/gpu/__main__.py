"""Measure one GPU in ten minutes: correctness first, then speed.

    python -m tools.bench.gpu --part 1 --out DIR        # at most 300 s
    python -m tools.bench.gpu --part 2 --out DIR        # at most 300 s

Each check is a process of its own with its own limit; one that fails or takes too long is a line, and the others go on.
Lines come as they are found, DIR/part-1.json grows with each check, and at the end DIR/section.md is a section for
docs/benchmarks.md. Torch, Triton and this checkout are enough; checks that need more say so. Without a GPU, and with
--dry-run, it prints what it would do. `--device cpu --tiny` runs every line of it at sizes that mean nothing.

Exit codes: 0; 1 if a check of correctness found something wrong or did not end.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.errors import UserError
from tools.bench.gpu.check_process import MeasuredCheck, run_check, send
from tools.bench.gpu.check_table import CHECKS, PART_SECONDS, Bench, CheckSkippedError, TimedCheck
from tools.bench.gpu.results_page import markdown, plan_lines, row_line, write_results

LEAST_SECONDS = 10  # with less time left in its part a check is not begun


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="one half; by default both, one after the other")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[check.name for check in CHECKS])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU computes in a second")
    parser.add_argument("--check", metavar="NAME", choices=[check.name for check in CHECKS], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_check(check: TimedCheck, options: argparse.Namespace) -> None:
    """Make one check in this process, and print its rows for the process that waits for them."""
    seconds = float(os.environ.get("FCMAE_CHECK_SECONDS", check.seconds))
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    bench = Bench(device, options.tiny, options.out.resolve(), seconds)
    torch.manual_seed(0)
    send(machine=describe_machine(bench))
    try:
        for row in check.run(bench):
            send(row=asdict(row))
        send(complete=True)
    except CheckSkippedError as skipped:
        send(skipped=str(skipped))


def measure_part(part: int, checks: list[TimedCheck], options: argparse.Namespace) -> list[MeasuredCheck]:
    """Make the checks of a part one after the other, within its time."""
    results: list[MeasuredCheck] = []
    began = time.monotonic()
    common = ["--device", options.device, "--out", str(options.out), *(["--tiny"] if options.tiny else [])]
    for check in checks:
        left = PART_SECONDS - (time.monotonic() - began)
        print(f"{check.name}: {check.measures}", flush=True)
        if left < LEAST_SECONDS:
            result = MeasuredCheck(check.name, part, check.is_correctness, trouble="no time was left in this part")
        else:
            command = [sys.executable, "-m", "tools.bench.gpu", "--check", check.name, *common]
            log = options.out / f"{check.name.replace(' ', '-')}.log"
            seconds = min(check.seconds, left)
            result = run_check(check, seconds, command, log, lambda row: print(row_line(row), flush=True))
        if result.trouble:
            print(f"  {'skipped' if result.skipped else 'INCOMPLETE'}: {result.trouble}", flush=True)
        results.append(result)
        write_results(options.out, part, results)
    return results


def describe_machine(bench: Bench) -> dict[str, str]:
    """The GPU and the versions that decide about figures."""
    facts = {"gpu": torch.cuda.get_device_name(bench.device) if bench.on_gpu else f"{platform.machine()} CPU"}
    facts |= {"torch": torch.__version__, "Python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for name in ("triton", "timm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    options = parse_options(arguments)
    if options.check:
        make_check(next(check for check in CHECKS if check.name == options.check), options)
        return 0
    parts = [options.part] if options.part else [1, 2]
    without = options.device == "cuda" and not torch.cuda.is_available()
    if options.dry_run or without:
        print("there is no GPU here; on one, this would run:" if without else "this would run:")
        print("\n".join(plan_lines(parts)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[MeasuredCheck] = []
    with tempfile.TemporaryDirectory(prefix="fcmae-gpu-") as caches:
        prepare_environment(options, Path(caches))
        for part in parts:
            checks = [check for check in CHECKS if check.part == part and check.name in (options.only or [check.name])]
            results += measure_part(part, checks, options)
    section = markdown(options.out)
    (options.out / "section.md").write_text(section)
    print(f"\n{section}")
    return int(any(result.failed for result in results))


def prepare_environment(options: argparse.Namespace, caches: Path) -> None:
    """Set what all checks' processes inherit: empty caches for compiled code, and on a CPU Triton's interpreter.

    Tiny blocks are not compiled on a CPU, because that takes minutes; TORCHDYNAMO_DISABLE=0 compiles them.
    """
    os.environ.update(
        TORCHINDUCTOR_CACHE_DIR=str(caches / "inductor"), TRITON_CACHE_DIR=str(caches / "triton"),
        TRITON_DEFAULT_FP_FUSION="1",
    )  # fmt: skip
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if options.tiny:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"tools.bench.gpu: {error}")
