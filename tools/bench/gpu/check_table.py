"""The checks in their order, each with its limit, and what a check gets and gives."""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch

PART_SECONDS = 300


class CheckSkippedError(Exception):
    """A check that this machine cannot make, and why."""


@dataclass(frozen=True)
class Row:
    """A figure of a check."""

    what: str
    value: float
    unit: str
    predicted: float | None = None
    """What a roofline, an estimate or a data sheet says."""
    limit: float | None = None
    """The value is wrong above it; None for a figure that is not right or wrong."""
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.limit is not None and not self.value <= self.limit


@dataclass(frozen=True)
class Bench:
    """Where and how large a check is."""

    device: torch.device
    tiny: bool
    """Sizes that a CPU computes in a second, to run every line of the program."""
    folder: Path
    """For compiled code and checkpoints; the checks of a run share it."""
    seconds: float = 60.0
    """After which a check begins nothing new."""
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self.began < self.seconds

    @property
    def model(self) -> str:
        return "convnextv2_atto" if self.tiny else "convnextv2_huge"

    def synchronise(self) -> None:
        """Wait until the device has done all work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_gib(self) -> float:
        """The most memory of the GPU that tensors had since the process began; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.on_gpu else 0.0


class TimedCheck(NamedTuple):
    """A check: a generator of rows in a module of this package, `check_NAME` with _ for blanks."""

    name: str
    module: str
    part: Literal[1, 2]
    seconds: int
    """The limit of its process."""
    is_correctness: bool
    measures: str
    needs: tuple[str, ...] = ()
    """Packages beside torch."""

    def run(self, bench: Bench) -> Iterator[Row]:
        """Make the check.

        Raises:
            CheckSkippedError: if a package is missing.
        """
        if missing := [name for name in self.needs if find_spec(name) is None]:
            raise CheckSkippedError(f"{missing[0]} is not installed")
        module = importlib.import_module(f"{__package__}.{self.module}")
        work: Callable[[Bench], Iterator[Row]] = getattr(module, f"check_{self.name.replace(' ', '_')}")
        yield from work(bench)


RECIPES = ("pydantic", "omegaconf", "yaml", "fsspec")  # what recipes and engines import
CHECKS = (
    TimedCheck("kernels", "kernel_checks", 1, 60, True,
        "the Triton kernels against float64: sides 8 to 1, channels of Huge and Atto, NaN around inputs, bits twice",
        ("triton",)),
    TimedCheck("peaks", "peak_checks", 1, 20, False, "a copy within memory; matrix products of Huge's sizes"),
    TimedCheck("fcmae eager", "step_checks", 1, 60, False,
        "an FCMAE step of Huge, 64 images: ms, utilisation, peak memory, top kernels, host waits"),
    TimedCheck("fcmae compiled", "step_checks", 1, 80, False, "the same with compiled blocks, from an empty cache"),
    TimedCheck("fcmae compiled again", "step_checks", 1, 40, False, "the same in a new process, from the cache"),
    TimedCheck("depthwise", "convolution_checks", 1, 40, False,
        "7x7 depthwise convolutions: of packed tokens; of whole images by cuDNN (NHWC, NCHW, benchmark) and by Triton"),
    TimedCheck("engines", "engine_checks", 2, 50, True,
        "a tiny model: ddp = fsdp = offload; a save, a restore, the next step; gradients against plain torch", RECIPES),
    TimedCheck("sanitizer", "sanitizer_check", 2, 50, True, "compute-sanitizer's memcheck on the check of the kernels"),
    TimedCheck("dense steps", "step_checks", 2, 100, False,
        "fine-tuning steps of Huge, 224 px x 64 and 512 px x 8, eager and compiled"),
    TimedCheck("timm step", "step_checks", 2, 30, False, "timm's model in a plain loop, 224 px x 64, eager", ("timm",)),
    TimedCheck("huge save", "save_checks", 2, 40, False,
        "a background save of Huge's state: seconds that training is blocked, copy to the host", RECIPES),
    TimedCheck("host time", "host_checks", 2, 30, False, "milliseconds of the host: index tables, launches, AdamW"),
)  # fmt: skip
