"""Stages on Slurm that wait for what a test does to them, so that it never comes too late: steps of milliseconds are
done before a busy machine's next look. Nothing that is computed depends on it.

The brake is a file beside the run: stage -> [steps, seconds]. A start of the stage makes so many steps, and each one
more takes so many seconds, or until the file says otherwise. START holds the ranks before they load the pipeline.
What each rank was given is noted in `batches_of(stage)`.
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

import tests.batches
from cluster.slurm import script
from cluster.slurm.worker import RunStage
from tests.batches import recorded

START = -1
FOR_EVER = 1e9


def brake(run: Path, seconds: float = 1, **steps: int) -> None:
    """Hold up these stages after so many steps of each start, and no others."""
    _write(run, {stage: [after, seconds] for stage, after in steps.items()})


def release(stage: Path) -> None:
    if _file(stage.parent).exists():
        held = json.loads(_file(stage.parent).read_text())
        _write(stage.parent, {name: value for name, value in held.items() if name != stage.name})


@contextmanager
def with_brakes() -> Iterator[None]:
    """What this process submits meanwhile obeys the brake, which must be set before, however often it is requeued."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "RunStage", BrakedStage)
        yield


def batches_of(stage: Path) -> Path:
    """The folder of `tests.batches`."""
    return stage.parent.with_name(f"{stage.parent.name}-{stage.name}-batches")


def _file(run: Path) -> Path:
    return run.with_name(f"{run.name}-brake.json")


def _write(run: Path, held: dict[str, list[float]]) -> None:
    new = _file(run).with_suffix(".new")
    new.write_text(json.dumps(held))
    new.replace(_file(run))


class BrakedStage(RunStage):
    """Rank 1 is slow, as with a slow disk, and the others wait for it. Signals take effect once it goes on."""

    def __call__(self) -> NoReturn:
        self._wait(START)
        from pipeline.training import trainer

        trainer.train_feed = self._slow(trainer.train_feed)
        super().__call__()

    def _slow(self, create: Callable[..., Any]) -> Callable[..., Any]:
        def slow(recipe: Any, data: Any, seed: int, world: Any, workers: int) -> Any:
            feed, taken = create(recipe, data, seed, world, workers), 0
            recorded(feed, recipe, seed, world, batches_of(Path(self.stage_directory)))
            honest = feed.slots

            def slots(step: int) -> Iterator[Any]:
                nonlocal taken
                if world.rank == 1:
                    self._wait(taken)
                taken += 1
                yield from honest(step)

            feed.slots = slots
            return feed

        return slow

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
for module in (sys.modules[__name__], tests.batches):
    cloudpickle.register_pickle_by_value(module)
