"""Which part of the GPUs' peak the steps of a stage reach: counted operations by measured time."""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.cost.gpu_peaks import peak_flops
from pipeline.distributed.processes import module_command
from pipeline.distributed.world import World
from pipeline.errors import first_line
from pipeline.stage.directory import Stage
from pipeline.storage.bounded_files import parse_json
from pipeline.tracking.journal import Journal


class Utilisation:
    """Has another process count the operations of an image, and says what a throughput means.

    Args:
        command: prints the operations as JSON.
        peak: FLOP/s of all GPUs together.
        note: gets a sentence if the operations cannot be counted.
    """

    def __init__(self, command: Sequence[str], peak: float, note: Callable[[str], None]):
        self._peak, self._note = peak, note
        self._flops: float | None = None
        # It traces on the meta device; a GPU would take memory of the training's.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._counting: subprocess.Popen[bytes] | None = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def of(self, images_per_second: float) -> float | None:
        """The part of the peak that a throughput uses; None until the operations are counted. Never waits."""
        if self._counting and self._counting.poll() is not None:
            out, error = self._counting.communicate()
            self._counting = None
            try:
                self._flops = float(parse_json(out))
            except (ValueError, TypeError):
                last = error.decode(errors="replace").strip().rpartition("\n")[2]
                self._note(f"counting the step's operations failed ({last})")
        return images_per_second * self._flops / self._peak if self._flops else None

    def close(self) -> None:
        """Stop counting."""
        if self._counting:
            self._counting.kill()
            self._counting.communicate()
            self._counting = None


@contextmanager
def counted_utilisation(stage: Stage, world: World, journal: Journal | None) -> Iterator[Utilisation | None]:
    """Start counting on rank 0 of ranks on GPUs, and stop at the end of the block.

    Yields None elsewhere, and where the utilisation cannot be known, which is journalled.
    """
    if world.device.type != "cuda" or journal is None:
        yield None
        return

    def note(sentence: str) -> None:
        journal.write("event", level="info", message=f"the utilisation of the GPUs is not known: {sentence}")

    gpu, precision, used = torch.cuda.get_device_name(world.device), stage.recipe.engine.precision, None
    peak = peak_flops(gpu, precision)
    if peak is None:
        note(f"pipeline/cost/gpu_peaks.py has no peak of {gpu} in {precision}")
    else:
        try:
            command = ["nice", *module_command("pipeline.cost.step_flops", stage.directory)]
            used = Utilisation(command, world.size * peak, note)
        except OSError as error:
            note(f"no process could be started to count the step's operations ({first_line(error)})")
    try:
        yield used
    finally:
        if used:
            used.close()
