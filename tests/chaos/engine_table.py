"""All engines on 1, 2 and 4 ranks against ddp on one: `python -m tests.chaos.engine_table [PART...]`.

`--only TEXT` leaves out the rows that do not contain it.

curves  largest relative difference of the loss over 50 steps, in fp32 and float64, gentle and harsh
resume  on 4 ranks: bits of weights, buffers, moments and averages after a resume, against the uninterrupted run
pairs   every engine resumed on every engine, 4 -> 2 and 2 -> 4 ranks, 20 more steps: difference from ddp on one rank
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.distributed.world import World
from tests.engines import ENGINES, gentle, harsh, largest_difference, resume_halfway, stage_recipe, train
from tests.ranks import on_ranks

STEPS = 50
CHANGES: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {},
    "finetune, BatchNorm": {"model": {"response": "bn"}},
}


def recipe(case: str, engine: str, precision: str = "fp32"):
    changes = {section: dict(values) for section, values in CHANGES[case].items()}
    return stage_recipe(case.split(",")[0], {**ENGINES[engine], "precision": precision}, **changes)


def curve(world: World, case: str, engine: str, precision: str, rate: str) -> list[float]:
    return train(
        world, recipe(case, engine, precision), range(STEPS), rate={"gentle": gentle, "harsh": harsh}[rate]
    ).losses


def curves(only: str) -> None:
    runs = [("fp64", "gentle", case) for case in CHANGES] + [("fp32", "gentle", case) for case in CHANGES]
    for precision, rate, case in [*runs, ("fp32", "harsh", "finetune")]:
        reference: list[float] = []
        for engine in ENGINES:
            label = f"{case} | {precision} | {rate} | {engine}"
            if (precision == "fp64" and engine.startswith("zero")) or only not in label:
                continue
            reference = reference or on_ranks(1, curve, case, "ddp", precision, rate)[0]
            row = []
            for ranks in (1, 2, 4):
                losses = on_ranks(ranks, curve, case, engine, precision, rate)[0]
                row.append(f"{largest_difference(losses, reference):.1e}")
            say(f"| {label} | {' | '.join(row)} |")


def resume(only: str) -> None:
    for case, engine in [(case, engine) for case in CHANGES for engine in ENGINES if only in f"{case} | {engine}"]:
        with tempfile.TemporaryDirectory() as folder:
            names, other = on_ranks(4, resume_halfway, recipe(case, engine), 6, Path(folder))[0]
        say(f"| {case} | {engine} | 4 ranks | {len(other)} of {len(names)} tensors differ |")


def saved(world: World, engine: str, directory: Path) -> None:
    train(world, recipe("finetune", engine), range(20), save=directory)


def resumed(world: World, engine: str, directory: Path) -> list[float]:
    return train(world, recipe("finetune", engine), range(20, 40), load=directory).losses


def reference(world: World) -> list[float]:
    return train(world, recipe("finetune", "ddp"), range(40)).losses


def pairs(only: str) -> None:
    expected = on_ranks(1, reference)[0][20:]
    with tempfile.TemporaryDirectory() as folder:
        for before, after in ((4, 2), (2, 4)):
            for source in (engine for engine in ENGINES if only in engine):
                on_ranks(before, saved, source, Path(folder) / f"{source}-{before}")
                row = []
                for target in ENGINES:
                    losses = on_ranks(after, resumed, target, Path(folder) / f"{source}-{before}")[0]
                    row.append(f"{largest_difference(losses, expected):.1e}")
                say(f"| {before} -> {after} | {source} -> | {' | '.join(row)} |")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["curves", "resume", "pairs"], metavar="PART")
    parser.add_argument("--only", default="", help="rows that contain this text")
    options = parser.parse_args()
    began = time.time()
    for part in options.parts:
        {"curves": curves, "resume": resume, "pairs": pairs}[part](options.only)
    say(f"{time.time() - began:.0f} s")
