"""What a stage does between its steps: save, evaluate, paint, report."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.data.feed import EvaluationFeed, TrainFeed
from pipeline.distributed.stop import AgreedStop
from pipeline.engines import Engine
from pipeline.health.watchdog import Watchdog
from pipeline.objectives import Objective
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import PICTURES_FOLDER
from pipeline.tracking import pictures
from pipeline.tracking.step_log import StepLog
from pipeline.training.evaluation import evaluate
from pipeline.training.saving import Checkpoints
from pipeline.training.trainer import Action


@dataclass(frozen=True)
class Actions:
    """All are collective. `validation` is None if nothing is to be evaluated; `last` is the stage's last step."""

    stage: Stage
    engine: Engine
    objective: Objective
    feed: TrainFeed
    validation: EvaluationFeed | None
    checkpoints: Checkpoints
    log: StepLog
    stop: AgreedStop
    watchdog: Watchdog
    last: int

    def all(self) -> list[Action]:
        """In the order in which they are to run after the same step."""
        return [
            Action(due=self._save_due, run=self._save),
            Action(due=self._save_due, run=self._report_damaged),
            Action(due=self._evaluation_due, run=self._evaluate),
        ]

    def _save_due(self, step: int) -> bool:
        # Also before the first step: a rollback may have to go back so far.
        return step == self.last or self.checkpoints.due(step)

    def _save(self, step: int) -> None:
        self.watchdog.phase("save", step)
        self.checkpoints.save(step, why="end" if step == self.last else "due", wait=False)

    def _report_damaged(self, step: int) -> None:
        replaced = int(self.engine.world.sum(torch.tensor(self.feed.replaced)))
        if replaced:
            message = f"{replaced} damaged images were replaced in this attempt; each is in its rank's log"
            self.log.write("event", level="warning", message=message, step=step, replaced=replaced)

    def _evaluation_due(self, step: int) -> bool:
        if self.validation is None:
            return False
        every_steps = max(round(self.stage.recipe.evaluation.every_epochs * self.feed.steps_per_epoch), 1)
        due = step == self.last or (step > 0 and step % every_steps == 0)
        return due and not self.engine.world.on_main(lambda: self.log.has("evaluate", step))

    def _evaluate(self, step: int) -> None:
        self.watchdog.phase("evaluate", step)
        metrics = evaluate(self.engine, self.objective, self.validation, self.stop, partial(self._paint, step))
        if metrics is not None:
            self.log.write("evaluate", step=step, metrics=metrics)
            lower_is_better = self.objective.metric == "loss"
            self.checkpoints.evaluated(step, metrics[self.objective.metric], lower_is_better)

    def _paint(self, step: int, model: nn.Module, batch: Batch) -> None:
        count = self.stage.recipe.tracking.pictures
        batch = replace(
            batch,
            images=batch.images[:count],
            labels=batch.labels[:count],
            ids=batch.ids[:count],
            valid=batch.valid[:count],
        )
        painted = self.objective.paint(model, batch) if count else None
        if painted is not None and self.log.is_main:
            path = self.stage.directory / PICTURES_FOLDER / f"step-{step:09d}.png"
            path.parent.mkdir(exist_ok=True)
            pictures.draw_reconstruction(
                batch.images[:count].cpu().numpy(), painted[0].cpu().numpy(), painted[1].cpu().numpy(), path
            )
            self.log.write("picture", step=step, path=str(path.relative_to(self.stage.directory)))
