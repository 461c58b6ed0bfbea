"""The loop. It knows no engine, no scheduler and no file format."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.feed import TrainFeed
from pipeline.distributed.stop import AgreedStop
from pipeline.engines import Engine
from pipeline.health.watchdog import Watchdog
from pipeline.objectives import Objective
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.tracking.startup import startup
from pipeline.tracking.step_log import StepLog
from pipeline.training.rollback import Rollbacks
from pipeline.training.saving import Checkpoints


@dataclass(frozen=True)
class Action:
    """Something to do between steps, when due and not done before. A stop may keep it from finishing."""

    due: Callable[[int], bool]
    run: Callable[[int], None]


def train(
    *,
    start: int,
    last: int,
    engine: Engine,
    objective: Objective,
    feed: TrainFeed,
    learning_rate: Callable[[int], float],
    actions: list[Action],
    checkpoints: Checkpoints,
    rollbacks: Rollbacks,
    log: "StepLog",
    stop: AgreedStop,
    watchdog: Watchdog,
) -> Outcome:
    """Train from `start` finished steps to `last`, or until the ranks agree to stop: then the state is saved.

    A step that a stop interrupts is thrown away whole, so a resumed run repeats it from its first slot. A state that a
    rollback is due for is never saved: whoever resumes from before it finds the same.
    """
    step = start
    stop()  # what came while the stage was set up, before the first batch is waited for
    while True:
        due = [action for action in actions if not stop.number and action.due(step)]
        if due or stop.number or step == last or log.is_full:
            log.flush()
            if rollbacks.asked():
                if stop.number:
                    return Outcome(OutcomeKind.SAVED, f"stopped by {stop.reason} before a rollback", step)
                watchdog.phase("roll back", step)
                step = rollbacks.go_back()
                continue
        for action in due:
            if not stop.number:
                action.run(step)
                log.restart_clock()
        if stop.number or step == last:
            if stop.number:
                log.write("stop", step=step, reason=stop.reason, asked=round(stop.time, 3))
            watchdog.phase("save", step)
            checkpoints.save(step, why=stop.reason if stop.number else "end")
            if stop.number:
                return Outcome(OutcomeKind.SAVED, f"stopped by {stop.reason}", step)
            return Outcome(OutcomeKind.DONE, step=step)
        if not rollbacks.skip(step + 1):
            lr = learning_rate(step)
            batches = watchdog.batches(feed.slots(step), step + 1)
            report = engine.step(batches, objective, step=step, lr=lr, should_stop=stop)
            if report is None:
                continue
            log.add(step + 1, report, lr, feed.take_wait())
            if startup.running:
                log.write("started", step=step + 1, **startup.end("first step"))
        step += 1
        checkpoints.poll()
