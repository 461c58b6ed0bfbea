"""When a stage saves, and what becomes of a save that fails: once per step, however many reasons there are."""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pipeline.checkpoint.asynchronous import BackgroundSave
from pipeline.checkpoint.retention import prune_store
from pipeline.checkpoint.store import EVER_COMMITTED, CheckpointStore
from pipeline.distributed.world import World
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, OvertakenError
from pipeline.recipe.sections import CheckpointSettings
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import CHECKPOINTS_FILE, CHECKPOINTS_FOLDER
from pipeline.storage.folder import Folder, write_json
from pipeline.tracking.journal import Event, effective_events

if TYPE_CHECKING:
    from pipeline.tracking.step_log import StepLog

Evaluation = tuple[int, float]  # step, value of the objective's metric
WRITE_TIMEOUT = timedelta(hours=2)  # how long a rank waits for the slowest to write its share


def checkpoint_home(stage: Stage) -> Folder:
    """Where a stage's checkpoints are: inside the run, or below the recipe's checkpoint.directory."""
    return _home(stage, stage.recipe.checkpoint.directory)


def _home(stage: Stage, directory: str | None) -> Folder:
    inside = stage.remote or Folder.at(stage.directory)
    return Folder.at(directory) / stage.recipe.name if directory else inside / CHECKPOINTS_FOLDER


def claim_home(stage: Stage) -> Folder:
    """`checkpoint_home`, noted in the stage and marked as this stage's. On rank 0.

    Raises:
        CheckpointError: if the recipe now names another place and the checkpoints were left behind, or if the place
            holds those of another run.
    """
    name, directory = stage.recipe.name, stage.recipe.checkpoint.directory
    path, home = stage.directory / CHECKPOINTS_FILE, _home(stage, directory)
    note = json.loads(path.read_text()) if path.exists() else {"id": uuid.uuid4().hex, "directory": directory}
    if note["directory"] != directory:
        before = _home(stage, note["directory"])
        if (before / EVER_COMMITTED).exists() and not (home / EVER_COMMITTED).exists():
            raise CheckpointError(
                f"stage {name} has its checkpoints in {before}, but checkpoint.directory now means {home}; move them "
                "there, or undo the change"
            )
    if directory:
        try:
            home.create("OWNER", f"{note['id']}\n".encode())
        except FileExistsError:
            if home.read("OWNER").decode().strip() != note["id"]:
                raise CheckpointError(
                    f"{home} holds the checkpoints of another run; set checkpoint.directory to another place"
                ) from None
    write_json(path, {**note, "directory": directory})
    return home


def open_store(stage: Stage, world: World, facts: dict[str, Any], on_event: Callable[[str], None]) -> CheckpointStore:
    """The checkpoints of a stage's running attempt. Collective."""
    world.on_main(lambda: str(claim_home(stage)))

    def still_current() -> bool:
        stage.attempts.upload()  # so that no checkpoint is ahead of the journal
        return stage.attempts.is_newest()

    return CheckpointStore(
        checkpoint_home(stage).url,
        attempt=stage.attempts.own,
        group=dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT),
        still_current=still_current,
        facts=facts,
        on_event=on_event,
        most_fallbacks=stage.recipe.checkpoint.most_fallbacks,
    )


class Checkpoints:
    """Saves the engine's state, in the background where that is asked for, and keeps what the recipe says.

    All methods are collective; every rank must call `poll` after the same steps.

    Args:
        saved: the step of the checkpoint that was restored.
        steps_per_epoch: for checkpoints that are kept every so many epochs.
        best: the best evaluation so far, the same on all ranks.
        hurry: whether a stop was asked for: then nothing is pruned.
        reach_steps: how far a rollback may go back.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        log: "StepLog",
        settings: CheckpointSettings,
        *,
        saved: int | None,
        steps_per_epoch: int,
        best: Evaluation | None = None,
        hurry: Callable[[], bool] = lambda: False,
        reach_steps: int = 0,
    ):
        self._store, self._engine, self._log, self._settings = store, engine, log, settings
        self._saved, self._best, self._hurry, self._reach_steps = saved, best, hurry, reach_steps
        epochs = settings.keep_every_epochs
        self._keep_every = max(round(epochs * steps_per_epoch), 1) if epochs else None
        self._open: BackgroundSave | None = None
        self._why, self._blocked_seconds = "", 0.0
        self._messages: SimpleQueue[str] = SimpleQueue()
        store.on_event = self._messages.put  # they may come from the thread; the journal is the main thread's

    def due(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint of this step."""
        return any(step % steps == 0 for steps in (self._settings.every_steps, self._keep_every) if steps)

    def save(self, step: int, why: str, *, wait: bool = True) -> None:
        """Save the state. With `wait` it is committed on return; without, perhaps only started.

        A failure raises CheckpointError if `wait`, or if the recipe says stop; else it is an event. One that shows
        later is raised by `poll`, or by the next save.
        """
        began = time.perf_counter()
        self._settle(forgive=wait)
        if step == self._saved:
            return
        self._log.flush()
        state = self._engine.state(step)
        if self._settings.asynchronous and not wait:
            self._open = self._store.save_in_background(state, step=step, why=why, then=self._prune)
            self._saved, self._why, self._blocked_seconds = step, why, time.perf_counter() - began
            return
        try:
            path = self._store.save(state, step=step, why=why)
        except CheckpointError as error:
            self._give_up(step, error, forgive=not wait and self._settings.on_failure == "continue")
            return
        self._saved = step
        seconds = time.perf_counter() - began
        self._prune()
        self._tell()
        self._note(step, why, path, seconds, time.perf_counter() - began)

    def poll(self) -> None:
        """Take note of a save that has ended; raises CheckpointError if it failed and the recipe says stop."""
        # A rank that saw the failure a step before the others would leave them waiting.
        if self._open and self._engine.world.agree(int(self._open.running and not self._open.error)) == 0:
            self._settle(forgive=False)

    def evaluated(self, step: int, value: float, lower_is_better: bool) -> None:
        """Take note of an evaluation; a new best is saved."""
        known = self._best[1] if self._best else None
        if math.isnan(value):
            return
        if known is None or (value < known if lower_is_better else value > known):
            self._best = (step, value)
            if self._settings.keep_best:
                self.save(step, why="best", wait=False)

    def settle(self) -> None:
        """Let an open save end, whatever becomes of it."""
        self._settle(forgive=True)

    def went_back(self, step: int) -> None:
        """Take note of a rollback to `step`: later checkpoints are gone, their steps are saved again."""
        self._saved = step
        if self._best and self._best[0] > step:
            self._best = None

    def close(self, timeout_seconds: float = 60) -> None:
        """Let an open save end, so that the process group can be left. For failures too: not collective."""
        if self._open:
            self._open.wait(timeout_seconds)

    def _settle(self, forgive: bool) -> None:
        """Wait for the open save, if there is one."""
        if self._open is None:
            return
        save, self._open = self._open, None
        save.wait()
        self._tell()
        if save.name:  # committed, whatever came after it
            self._note(save.step, self._why, save.name, save.seconds, self._blocked_seconds)
        if self._engine.world.agree(int(save.error is not None)):
            error = save.error or CheckpointError("a checkpoint failed on another rank; see its log")
            self._give_up(save.step, error, forgive or self._settings.on_failure == "continue")

    def _give_up(self, step: int, error: BaseException, forgive: bool) -> None:
        self._saved = None
        self._tell()
        if isinstance(error, OvertakenError) or not isinstance(error, CheckpointError) or not forgive:
            raise error
        self._log.write("event", level="error", message=f"the checkpoint of step {step} failed: {error}")

    def _prune(self) -> None:
        if self._store.from_rank_zero(self._hurry):
            return
        best = {self._best[0]} if self._best and self._settings.keep_best else set()
        try:
            prune_store(
                self._store,
                keep_last=self._settings.keep_last,
                keep_every=self._keep_every,
                keep_steps=best,
                reach_steps=self._reach_steps,
            )
        except OvertakenError:
            raise
        except CheckpointError as error:
            self._store.on_event(f"old checkpoints were not pruned: {error}")

    def _note(self, step: int, why: str, path: str, seconds: float, blocked_seconds: float) -> None:
        times = {"seconds": round(seconds, 3), "blocked_seconds": round(blocked_seconds, 3)}
        self._log.write("save", step=step, why=why, path=path, **times)

    def _tell(self) -> None:
        while not self._messages.empty():
            self._log.write("event", level="warning", message=self._messages.get())


def best_evaluation(events: Iterable[Event], metric: str, lower_is_better: bool) -> Evaluation | None:
    """The best of a journal's standing evaluations."""
    found: list[Evaluation] = [
        (event["step"], event["metrics"][metric])
        for event in effective_events(events)
        if event.get("kind") == "evaluate" and isinstance(event.get("metrics"), Mapping) and metric in event["metrics"]
    ]
    found = [(step, value) for step, value in found if not math.isnan(value)]
    return (min if lower_is_better else max)(found, key=lambda evaluation: evaluation[1], default=None)
