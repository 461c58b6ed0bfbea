"""The losses of the demo's first steps, to the bit: a change of any of them is meant, or a mistake.

    python -m tests.golden            compare with tests/golden.json
    python -m tests.golden --write    after a change that is meant

The recipe is the demo's, on images made here from integers alone, with a smaller batch so that it takes seconds. On
the machine and versions that the file names every loss must be equal to the bit. Elsewhere it cannot be: oneDNN, MKL
and ATen choose their kernels by the processor's instruction set and cache sizes, and each sums in its own order. Then
the losses must agree to `TOLERANCE`: forcing AVX2, and then SSE, on an AVX-512 machine changed them by 1.1e-7 at most.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("golden.json")
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
TOLERANCE = 1e-5  # relative
STEPS, BATCH, CLASSES = 20, 32, 10
FORCES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # choose kernels by hand
OVERRIDES = [
    f"defaults.batch.global_batch={BATCH}", "defaults.batch.slot=8", "defaults.evaluation.batch=50",
    "defaults.engine.threads=1", "defaults.engine.device=cpu", "defaults.data.workers=1",
    "defaults.tracking.mlflow=false", "defaults.tracking.pictures=0",
    "stages.pretrain.schedule.epochs=4", "stages.pretrain.schedule.warmup_epochs=1",
    "stages.intermediate.schedule.epochs=4", "stages.intermediate.schedule.warmup_epochs=1",
    "stages.finetune=null",
]  # fmt: skip


def image(number: int, size: int = 32) -> tuple[np.ndarray, int]:
    """(size, size, 3) uint8 and its class. Integers only: sines differ in their last bit between machines."""
    label = number % CLASSES
    draw = np.random.Philox(key=number).random_raw(4 + size * size * 3)
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    shift, period = (int(v) for v in draw[:2] % np.uint64(16))
    bands = (x * (label % 4) + y * (label % 3) + (x * y // 8) * (label // 5) + shift) * (6 + label) % (40 + period)
    noise = (draw[4:] % np.uint64(48)).astype(np.int64).reshape(size, size, 3)
    pixels = 40 + 3 * bands[..., None] // 2 + noise + 8 * np.arange(3) * (label % 3)
    return pixels.clip(0, 255).astype(np.uint8), label


def measure(directory: Path) -> dict[str, Any]:
    """Train the two stages in this process; the machine, the data's hashes, and the losses as hex floats by stage."""
    from cluster.chain import open_chain
    from pipeline.data.beton import open_beton
    from pipeline.data.beton_writer import BetonWriter
    from pipeline.recipe import load_recipe
    from pipeline.run import run_stage
    from pipeline.stage.outcome import OutcomeKind
    from pipeline.tracking import journal

    data = []
    for name, first, count in (("train", 0, STEPS // 4 * BATCH), ("validation", 10**6, 50)):
        with BetonWriter(directory / f"{name}.beton", [f"class {i}" for i in range(CLASSES)], count) as writer:
            for number in range(first, first + count):
                writer.add(*image(number))
        data.append(f"defaults.data.{name}={directory}/{name}.beton")
    losses = {}
    for stage in open_chain(load_recipe(RECIPE, [*OVERRIDES, *data]), directory / "run"):
        outcome = run_stage(stage.directory)
        assert outcome.kind is OutcomeKind.DONE, outcome
        found = journal.step_events(journal.read_events(stage.directory / "journal.jsonl"))
        losses[stage.recipe.name] = [event["loss"].hex() for event in found.values()]
    hashes = {name: open_beton(directory / f"{name}.beton").sha256 for name in ("train", "validation")}
    return {"machine": machine(), "data": hashes, "losses": losses}


def machine() -> dict[str, str]:
    """What the bits may depend on."""
    import torch

    from pipeline.stage.environment import describe_machine

    here = describe_machine()
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    forced = {name: os.environ[name] for name in FORCES if name in os.environ}
    return {
        "architecture": platform.machine(),
        "cpu": str(here["cpu"]),
        "flags_crc32": f"{zlib.crc32(' '.join(sorted(flags.split())).encode()):08x}",
        "capability": str(here["cpu_capability"]),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **forced,
    }


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A sentence for each stage that is not as the file has it, and one for other data."""
    other = golden["data"] != found["data"]
    said = ["the images are others: they, or the .beton format, have changed"] if other else []
    same = golden["machine"] == found["machine"]
    allowed = 0.0 if same else TOLERANCE
    for stage in golden["losses"].keys() | found["losses"].keys():
        old, new = (np.array([float.fromhex(v) for v in which["losses"].get(stage, [])]) for which in (golden, found))
        if old.shape != new.shape:
            said.append(f"{stage}: {len(new)} steps instead of {len(old)}")
            continue
        away = np.abs(new / old - 1)
        if wrong := np.flatnonzero(~(away <= allowed)).tolist():
            at = wrong[0]
            said.append(
                f"{stage}: from step {at + 1} on the loss differs ({new[at]!r} instead of {old[at]!r}), by up to"
                f" {away.max():.1e} of it; allowed is {allowed:g} on {'this' if same else 'another'} machine"
            )
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make what comes out the golden curve")
    parser.add_argument("--to", type=Path, default=FILE, help="the file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory))
    if options.write:
        options.to.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.to} is written")
        return 0
    said = differences(json.loads(FILE.read_text()), found)
    print("\n".join(said) or "the losses are those of tests/golden.json")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
