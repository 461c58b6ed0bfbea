"""Choose how many slots go through the model at once: by short measurements on a GPU, by the estimate on a CPU.

The choice changes how fast a stage runs, and no result: slots are computed alike in any micro-batch.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.cost.measure import available_bytes
from pipeline.cost.memory import estimate_peak
from pipeline.distributed.processes import module_command
from pipeline.recipe import StageRecipe, load_stage_recipe, write_recipe
from pipeline.storage.announcement import announced
from pipeline.storage.user_cache import keep_compiled_code_local

CPU_IMAGES = 32  # a larger micro-batch is no faster on a CPU
CPU_SHARE = 0.6  # of the free memory, for all processes together
GPU_SHARE = 0.85  # of the GPU's memory; the allocator's fragments and NCCL take the rest
FASTER = 1.03  # a larger micro-batch must be so much faster than the last one to be preferred
MEASURE_SECONDS = 300


def choose_micro_slots(recipe: StageRecipe, processes: int, device: str) -> tuple[int, str]:
    """Choose `batch.micro_slots` for a stage on this machine, and say how it was chosen."""
    sizes = micro_sizes(recipe, processes)
    if len(sizes) == 1:
        return sizes[0], "the only one that is possible"
    return _measured(recipe, sizes) if device == "cuda" else _estimated(recipe, sizes, processes)


def micro_sizes(recipe: StageRecipe, processes: int) -> list[int]:
    """The numbers of slots that divide a process's share, ascending."""
    if recipe.model.counts_batches or recipe.has_batch_grn:
        return [1]
    share = max(recipe.batch.slots // processes, 1)
    return [size for size in range(1, share + 1) if share % size == 0]


def _estimated(recipe: StageRecipe, sizes: list[int], processes: int) -> tuple[int, str]:
    """The largest micro-batch of up to CPU_IMAGES images whose estimated memory is free."""
    free = available_bytes() * CPU_SHARE / processes
    fitting = [size for size in sizes if size * recipe.batch.slot <= CPU_IMAGES] or sizes[:1]
    for size in reversed(fitting):
        peak = sum(term.bytes for term in estimate_peak(recipe.with_micro_slots(size), processes, "cpu"))
        if peak <= free:
            return size, f"{peak / 2**30:.1f} GiB by estimate, of {free / 2**30:.1f} for each process"
    return fitting[0], f"the smallest; {peak / 2**30:.1f} GiB by estimate, and {free / 2**30:.1f} are free"


def _measured(recipe: StageRecipe, sizes: list[int]) -> tuple[int, str]:
    """The fastest micro-batch that fits, measured in a process of its own, which frees the GPU's memory by its end.

    Each size is compiled anew, which may take longer than the time that all of them have: those that were measured by
    then count.
    """
    trouble = ""
    with TemporaryDirectory() as folder, announced("measuring which micro-batch is the fastest on this GPU"):
        path = Path(folder) / "stage.yaml"
        write_recipe(recipe, path)
        command = module_command("tools.own_images.micro_batch", path, *sizes)
        try:
            answer = subprocess.run(command, stdout=subprocess.PIPE, timeout=MEASURE_SECONDS, check=True).stdout
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            answer, trouble = error.stdout or b"", type(error).__name__
    try:
        chosen, speed = json.loads(answer.splitlines()[-1])
    except (ValueError, IndexError) as error:
        return 1, f"the smallest, because measuring failed ({trouble or type(error).__name__})"
    return chosen, f"measured: {speed:,.0f} images a second" + (
        f", before measuring failed ({trouble})" * bool(trouble)
    )


def measure_micro_batch(recipe: StageRecipe, sizes: list[int]) -> Iterator[tuple[int, float]]:
    """Run steps of ever larger micro-batches until one does not fit or is no faster; yields each better one with its
    images a second.

    Raises:
        RuntimeError: if not even the smallest fits.
    """
    import torch

    from pipeline.cost.measure import measure_steps

    memory = torch.cuda.get_device_properties(0).total_memory
    best: tuple[int, float] | None = None
    for size in sizes:
        gc.collect()  # the last model, because compiled blocks refer to themselves
        try:
            measured = measure_steps(recipe.with_micro_slots(size), steps=2)
        except torch.OutOfMemoryError:
            break
        fits = measured.allocated_bytes <= GPU_SHARE * memory
        if best and not (fits and measured.images_per_second > FASTER * best[1]):
            break
        best = size, measured.images_per_second
        yield best
    if best is None:
        raise RuntimeError("out of memory")


if __name__ == "__main__":
    keep_compiled_code_local()  # where ranks look for it
    for better in measure_micro_batch(load_stage_recipe(Path(sys.argv[1])), [int(size) for size in sys.argv[2:]]):
        print(json.dumps(better), flush=True)
