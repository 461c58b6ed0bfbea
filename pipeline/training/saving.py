"""When a stage saves checkpoints, where they are, and what follows from a save that fails."""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.asynchronous import BackgroundSave
from pipeline.checkpoint.retention import prune_store
from pipeline.checkpoint.store import EVER_COMMITTED, CheckpointStore, ever_committed
from pipeline.distributed.agreement import Agreement, Topic
from pipeline.distributed.world import World
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, OvertakenError
from pipeline.recipe import StageRecipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import CHECKPOINTS_FILE, CHECKPOINTS_FOLDER
from pipeline.storage.folder import Folder, write_json
from pipeline.storage.run_records import required_record
from pipeline.tracking.journal import Event, effective_events, is_number
from pipeline.tracking.step_log import StepLog

Evaluation = tuple[int, float]  # step, value of the objective's metric
WRITE_TIMEOUT = timedelta(hours=2)  # how long a rank waits for the slowest to write its shard


def checkpoint_home(stage: Stage) -> Folder:
    """The folder of a stage's checkpoints: in the stage, or below the recipe's checkpoint.directory."""
    return _home(stage, stage.recipe.checkpoint.directory)


def _home(stage: Stage, directory: str | None) -> Folder:
    inside = stage.remote or Folder.at(stage.directory)
    return Folder.at(directory) / stage.recipe.name if directory else inside / CHECKPOINTS_FOLDER


def claim_home(stage: Stage) -> Folder:
    """Mark the folder of the checkpoints as this stage's, and record it in the stage. On rank 0.

    Raises:
        CheckpointError: if the recipe now names another folder and the checkpoints were left behind, or if the folder
            holds the checkpoints of another run.
    """
    name, directory = stage.recipe.name, stage.recipe.checkpoint.directory
    path, home = stage.directory / CHECKPOINTS_FILE, checkpoint_home(stage)
    remedy = f"restore it from a copy; without one, write the line of {home}/OWNER into it as id, and its directory"
    note = required_record(path, remedy, _names_a_home)
    if note is None:  # recorded before OWNER has the id, so that a start that is killed in between stays the owner
        note = {"id": uuid.uuid4().hex, "directory": None}
        write_json(path, note)
        stage.attempts.upload()
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


def _names_a_home(note: Mapping[str, Any]) -> bool:
    return isinstance(note.get("id"), str) and isinstance(note.get("directory", 0), str | None)


def has_checkpoint(stage: Stage, world: World) -> bool:
    """Claim the folder of the checkpoints; returns whether one was ever committed there. Collective.

    Raises:
        CheckpointError: as `claim_home`.
    """
    return world.on_main(lambda: ever_committed(claim_home(stage)))


def open_store(
    stage: Stage,
    facts: dict[str, Any],
    on_event: Callable[[str], None],
    parents: Iterable[str] = (),
) -> CheckpointStore:
    """Open the checkpoints of a stage's running attempt. Collective.

    Args:
        facts: JSON for every manifest.
        on_event: gets warnings on rank 0, also from the thread of a background save.
        parents: where the weights of the first checkpoint are from.
    """

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
        parents=parents,
        most_fallbacks=stage.recipe.checkpoint.most_fallbacks,
    )


class Checkpoints:
    """Saves the engine's state, in the background if the recipe says so, and prunes old checkpoints.

    All methods but `due` and `close` are collective. All ranks must call `poll` after the same steps.

    Args:
        store: of the stage.
        recipe: what to keep, and how far a rollback may go back.
        steps_per_epoch: for checkpoints that are kept every so many epochs.
        restored: the step of the restored checkpoint, if any; it is not saved again.
        best: the best evaluation so far, the same on all ranks.
        agreement: of all ranks, read before each micro-batch. It says when a background save has ended on all ranks,
            when a checkpoint is due by the clock, and that the run stops, and nothing is pruned any more.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        log: StepLog,
        recipe: StageRecipe,
        steps_per_epoch: int,
        *,
        restored: int | None,
        best: Evaluation | None = None,
        agreement: Agreement,
    ):
        self.store = store
        self._engine, self._log, self._agreement = engine, log, agreement
        self._settings, self._reach_steps = recipe.checkpoint, recipe.health.reach_steps
        self.keep_every = self._settings.kept_every(steps_per_epoch)
        self._saved, self._best = restored, best
        self._open: BackgroundSave | None = None
        self._why, self._blocked_seconds = "", 0.0  # of the open save
        self._opened = 0  # number of background saves
        self._count, self._counted_at = 0, time.monotonic()  # of the checkpoints asked for, and time of the last one

    def due(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint of this step. All ranks decide alike: the clock is rank 0's."""
        if any(step % steps == 0 for steps in (self._settings.steps, self.keep_every) if steps):
            return True
        by_clock = self._settings.every_minutes is not None
        return by_clock and (step == 0 or self._agreement.agreed[Topic.SAVE_DUE] > self._count)

    def save(self, step: int, why: str, *, wait: bool = True) -> None:
        """Save the state of all ranks, unless this step is saved.

        Args:
            why: for the journal and the manifest.
            wait: return only when the checkpoint is committed; else the save may run on in the background.

        Raises:
            CheckpointError: if the save failed and `wait`, or checkpoint.on_failure is "stop". Otherwise a failure is
                journalled. A failure in the background is raised by `poll`, or by the next `save`.
        """
        began = time.perf_counter()
        self._count, self._counted_at = self._count + 1, time.monotonic()
        self._finish_open_save(forgive=wait)
        if step == self._saved:
            return
        self._log.flush()
        state = self._engine.state(step)
        if self._settings.asynchronous and not wait:
            self._open = self.store.save_in_background(state, step=step, why=why, then=self._prune)
            self._opened += 1
            self._saved, self._why, self._blocked_seconds = step, why, time.perf_counter() - began
            return
        try:
            path = self.store.save(state, step=step, why=why)
        except CheckpointError as error:
            self._report_failure(step, error, forgive=not wait and self._settings.on_failure == "continue")
            return
        self._saved = step
        seconds = time.perf_counter() - began
        self._prune()
        self._journal_save(step, why, path, seconds, time.perf_counter() - began)

    def poll(self) -> None:
        """Journal a background save that has ended on all ranks, and say on rank 0 whether a checkpoint is due.

        Raises:
            CheckpointError: if the save failed and checkpoint.on_failure is "stop".
        """
        own, minutes = self._agreement.own, self._settings.every_minutes
        if minutes and self._engine.world.is_main and time.monotonic() - self._counted_at >= 60 * minutes:
            own[Topic.SAVE_DUE] = self._count + 1
        if self._open:
            own[Topic.SAVES_LEFT] = -(self._opened - int(self._open.running and not self._open.error))
            # The ranks agree because one that saw a failure a step early would leave the others waiting.
            if self._agreement.agreed[Topic.SAVES_LEFT] == -self._opened:
                self._finish_open_save(forgive=False)

    def evaluated(self, step: int, value: float, metric: str) -> None:
        """Save the state if `value` of the objective's metric is the best so far and the recipe keeps the best."""
        if math.isnan(value) or (self._best and not is_better(value, self._best[1], metric)):
            return
        self._best = (step, value)
        if self._settings.keep_best:
            self.save(step, why="best", wait=False)

    def settle(self) -> None:
        """Wait for an open save; a failure is journalled."""
        self._finish_open_save(forgive=True)

    def went_back(self, step: int) -> None:
        """Forget the later steps after a rollback to `step`, so that they are saved again."""
        self._saved = step
        if self._best and self._best[0] > step:
            self._best = None

    def close(self, timeout_seconds: float = 60) -> None:
        """Wait for an open save before the process group is left. Not collective, so usable after a failure."""
        if self._open:
            self._open.wait(timeout_seconds)

    def _finish_open_save(self, forgive: bool) -> None:
        if self._open is None:
            return
        save, self._open = self._open, None
        save.wait()
        self._agreement.own[Topic.SAVES_LEFT] = -self._opened
        if save.name:  # committed, even if pruning failed afterwards
            self._journal_save(save.step, self._why, save.name, save.seconds, self._blocked_seconds)
        if self._engine.world.agree(int(save.error is not None)):
            error = save.error or CheckpointError("a checkpoint failed on another rank; see its log")
            self._report_failure(save.step, error, forgive or self._settings.on_failure == "continue")

    def _report_failure(self, step: int, error: BaseException, forgive: bool) -> None:
        self._saved = None
        if isinstance(error, OvertakenError) or not isinstance(error, CheckpointError) or not forgive:
            raise error
        self._log.write("event", level="error", message=f"the checkpoint of step {step} failed: {error}")

    def _prune(self) -> None:
        if self.store.from_rank_zero(lambda: self._agreement.agreed[Topic.STOP] != 0):
            return
        try:
            prune_store(
                self.store,
                keep_last=self._settings.keep_last,
                keep_every=self.keep_every,
                keep_steps={self._best[0]} if self._best and self._settings.keep_best else set(),
                reach_steps=self._reach_steps,
            )
        except OvertakenError:
            raise
        except CheckpointError as error:
            self.store.on_event(f"old checkpoints were not pruned: {error}")

    def _journal_save(self, step: int, why: str, path: str, seconds: float, blocked_seconds: float) -> None:
        times = {"seconds": round(seconds, 3), "blocked_seconds": round(blocked_seconds, 3)}
        self._log.write("save", step=step, why=why, path=path, **times)


def is_better(value: float, other: float, metric: str) -> bool:
    """Whether a value of the objective's metric is better than another one."""
    return value < other if metric == "loss" else value > other


def best_evaluation(events: Iterable[Event], metric: str) -> Evaluation | None:
    """The best evaluation of a journal's events, without the steps that were rolled back."""
    evaluations: list[Evaluation] = [
        (event["step"], event["metrics"][metric])
        for event in effective_events(events)
        if event.get("kind") == "evaluate" and "step" in event and is_number((event.get("metrics") or {}).get(metric))
    ]
    evaluations = [(step, value) for step, value in evaluations if not math.isnan(value)]
    return (min if metric == "loss" else max)(evaluations, key=lambda evaluation: evaluation[1], default=None)
