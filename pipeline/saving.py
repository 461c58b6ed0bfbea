"""When and how a stage saves: once per step, however many reasons there are."""

import time
from typing import TYPE_CHECKING

from pipeline.checkpoint.retention import prune
from pipeline.checkpoint.store import CheckpointStore
from pipeline.engines import Engine

if TYPE_CHECKING:
    from pipeline.trainer import StepLog


class Checkpoints:
    """Saves the engine's state once per step, however many reasons there are."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        log: "StepLog",
        saved: int | None,
        keep_last: int,
        reach_steps: int = 0,
    ):
        self._store, self._engine, self._log = store, engine, log
        self._saved, self._keep_last, self._reach_steps = saved, keep_last, reach_steps

    def settle(self) -> None:
        """Wait for whatever is being saved. Collective."""

    def went_back(self, step: int) -> None:
        """Later checkpoints are gone: their steps are saved again."""
        self._saved = step

    def save(self, step: int, why: str) -> None:
        if step == self._saved:
            return
        self._log.flush()
        began = time.perf_counter()
        path = self._store.save(self._engine.state(step), step=step, why=why)
        self._saved = step
        self._log.write("save", step=step, why=why, path=path, seconds=round(time.perf_counter() - began, 3))
        prune(self._store, keep_last=self._keep_last, reach_steps=self._reach_steps)
