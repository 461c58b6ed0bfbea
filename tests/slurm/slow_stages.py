"""Stages on Slurm that wait for what a test does to them. Without that they would be done before: their steps take
milliseconds, and a look of the test at a busy machine takes seconds. What they compute stays the same.

A file beside the run says how: {stage: [steps, seconds]}. After so many steps of each start of the stage, each further
step takes so many seconds, or until the file says otherwise. START holds the ranks before they load the pipeline. Each
rank records what it was given in `batches_folder(stage)`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import pytest
import torch

import tests.batch_hashes
from cluster.slurm import script
from cluster.slurm.worker import RunStage
from tests.batch_hashes import record_batches

START = -1
FOR_EVER = 1e9


def slow_down(run: Path, seconds: float = 1, **steps: int) -> None:
    """Hold up these stages after so many steps of each start, and no others."""
    _write(run, {stage: [after, seconds] for stage, after in steps.items()})


def break_gpus(run: Path, code: int, step: int) -> None:
    """Let the GPU of the last rank report an error of this number before each start of that step, on any node."""
    run.with_name(f"{run.name}-gpus.json").write_text(json.dumps([code, step]))


def release(stage: Path) -> None:
    if _file(stage.parent).exists():
        held = json.loads(_file(stage.parent).read_text())
        _write(stage.parent, {name: value for name, value in held.items() if name != stage.name})


@contextmanager
def submitting_slow_stages() -> Iterator[None]:
    """Jobs that this process submits meanwhile obey `slow_down`, which must have been called, in all their restarts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "RunStage", SlowStage)
        yield


def batches_folder(stage: Path) -> Path:
    """Where the ranks of a stage record what they are given (see `tests.batch_hashes`)."""
    return stage.parent.with_name(f"{stage.parent.name}-{stage.name}-batches")


def _file(run: Path) -> Path:
    return run.with_name(f"{run.name}-slow.json")


def _write(run: Path, held: dict[str, list[float]]) -> None:
    new = _file(run).with_suffix(".new")
    new.write_text(json.dumps(held))
    new.replace(_file(run))


class SlowStage(RunStage):
    """Rank 1 is slow, as with a slow disk, and the others wait for it. Signals take effect once it goes on."""

    def __call__(self) -> NoReturn:
        self._wait(START)
        from pipeline.training import trainer

        trainer.train_feed = self._slow(trainer.train_feed)
        super().__call__()

    def _slow(self, create: Callable[..., Any]) -> Callable[..., Any]:
        def slow(recipe: Any, data: Any, seed: int, world: Any, *rest: Any) -> Any:
            feed, taken = create(recipe, data, seed, world, *rest), 0
            record_batches(feed, recipe, seed, world, batches_folder(Path(self.stage_directory)))
            honest = feed.slots

            def slots(step: int) -> Iterator[Any]:
                nonlocal taken
                if world.rank == 1:
                    self._wait(taken)
                self._fail(world, step)
                taken += 1
                yield from honest(step)

            feed.slots = slots
            return feed

        return slow

    def _fail(self, world: Any, step: int) -> None:
        run = Path(self.stage_directory).parent
        broken = run.with_name(f"{run.name}-gpus.json")
        if broken.exists() and world.rank == world.size - 1:
            code, at = json.loads(broken.read_text())
            if step == at:
                error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
                error.error_code = code
                raise error

    def _wait(self, taken: int) -> None:
        """Before the step after so many of this start."""
        stage, began = Path(self.stage_directory), time.monotonic()
        while held := json.loads(_file(stage.parent).read_text()).get(stage.name):
            steps, seconds = held
            due = taken == START if steps == START else taken >= steps
            if not due or time.monotonic() - began >= seconds:
                return
            time.sleep(0.02)


# The jobs run the code as it was submitted, in which there are no tests.
for module in (sys.modules[__name__], tests.batch_hashes):
    cloudpickle.register_pickle_by_value(module)
