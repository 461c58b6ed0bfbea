"""Train one stage: assemble its parts, then loop over its steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from pipeline.checkpoint.store import CheckpointStore
from pipeline.data.batch import example_batch
from pipeline.data.open import evaluation_feed, open_stage_data, train_feed
from pipeline.data.subset import Subset
from pipeline.distributed.agreement import AgreedStop
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.engines.base import sharding_units
from pipeline.engines.compiled_blocks import compiles_blocks
from pipeline.engines.large_kernel_choice import set_large_kernels
from pipeline.engines.plain_comparison import check_code
from pipeline.health.watchdog import PATIENCE, Watchdog
from pipeline.objectives import create_objective
from pipeline.optim.schedule import learning_rate
from pipeline.randomness import text_key
from pipeline.stage.device_errors import own_node
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.announcement import announced
from pipeline.storage.file_names import CURVES_FILE, JOURNAL_FILE, PICTURES_FOLDER, PROFILES_FOLDER
from pipeline.storage.folder import Folder
from pipeline.tracking import pictures
from pipeline.tracking.journal import Journal, read_events
from pipeline.tracking.rank_times import ForwardClock, RankTimes
from pipeline.tracking.startup import startup
from pipeline.tracking.step_log import StepLog
from pipeline.tracking.step_profiler import StepProfiler
from pipeline.tracking.utilisation import counted_utilisation
from pipeline.training import handoff, records
from pipeline.training.evaluation import evaluate
from pipeline.training.failures import explain_lost_peers
from pipeline.training.initial_sparsity import start_sparsity
from pipeline.training.painting import Painter
from pipeline.training.rollback import roll_back
from pipeline.training.saving import Checkpoints, best_evaluation, has_checkpoint, open_store
from pipeline.training.step_guard import StepGuard


class Training:
    """One attempt at a stage, with all its parts. Every method is collective.

    Attributes:
        start: the number of finished steps when this attempt began.
        last: the number of steps of the stage.
    """

    @classmethod
    @contextmanager
    def assemble(cls, stage: Stage, world: World, watchdog: Watchdog, stop: AgreedStop) -> Iterator["Training | None"]:
        """Open the data and the journal and make all parts; close them at the end of the block.

        Yields None if the ranks agreed to stop while the data was fetched or blocks were compiled.
        """
        with ExitStack() as stack:
            data = open_stage_data(stage.recipe, world, stop, stack)
            if data is None:
                yield None
                return
            world.on_main(lambda: stage.pin_data(_hashes(data)))
            startup.lap("data")
            # Longer than a machine compiles, so that a kernel that never ends is found.
            limit = 2 * PATIENCE * stage.recipe.health.stall_seconds
            with explain_lost_peers(stage, watchdog):
                check = check_code(stage.recipe, world, stop.at_once, limit)
            if check is None:
                yield None
                return
            stack.enter_context(check.in_force())
            if check.event:
                startup.lap("compare")
            journal = stack.enter_context(records.open_journal(stage, world, stop))
            records.write_code_check(journal, check)
            stack.enter_context(explain_lost_peers(stage, watchdog))
            yield cls(stage, world, watchdog, stop, data, journal, stack)

    def __init__(
        self,
        stage: Stage,
        world: World,
        watchdog: Watchdog,
        stop: AgreedStop,
        data: Mapping[str, Subset],
        journal: Journal | None,
        stack: ExitStack,
    ):
        recipe = stage.recipe
        self.stage, self.world, self.watchdog, self.stop = stage, world, watchdog, stop
        seed = text_key(recipe.seed, recipe.name)
        self.objective = create_objective(recipe, seed)
        self.guard = StepGuard(recipe.health, world.device)
        self.engine = create_engine(self.objective.build_model, recipe, world, self.guard)
        self.clock = ForwardClock(sharding_units(self.engine.module), world.device)
        ranks = RankTimes(self.clock, world.rank, world.gather(own_node()))
        tracking = recipe.tracking
        used = stack.enter_context(counted_utilisation(stage, world, journal))
        late, every = world.device.type == "cuda", tracking.log_every_steps
        self.log = StepLog(journal, world.sum, every, recipe.batch.global_batch, ranks, used, late)
        profiles = (stage.remote or Folder.at(stage.directory)) / PROFILES_FOLDER
        self.profiler = StepProfiler(profiles, stage.attempts.own, world)
        stack.callback(self.profiler.close)
        if forms := set_large_kernels(stage.directory, self.engine, self.objective):
            self.log.write("large_kernels", forms=forms)
        workers = recipe.data.workers or max(world.cores() - 1, 1)
        prepare = self.objective.prepare
        self._has_evaluated = False
        self.feed = train_feed(recipe, data["train"], seed, world, workers, prepare)
        stack.callback(self.feed.close)
        self.validation = None
        if "validation" in data:
            self.validation = evaluation_feed(recipe, data["validation"], world, workers, prepare)
        startup.lap("model")
        self.last = recipe.total_steps(self.feed.steps_per_epoch)
        objects = data["train"].beton.objects
        self.classes, self.category_ids = data["train"].classes, objects and objects.category_ids
        store, restored = self._load_weights(_hashes(data))
        self.start = restored or 0
        startup.lap("weights")
        records.write_attempt(journal, recipe, data, world, step=self.start, total_steps=self.last)
        self.engine.warm_up(example_batch(recipe, world.size), self.objective)
        startup.lap("warm-up")
        events = stage.directory / JOURNAL_FILE
        self.checkpoints = Checkpoints(
            store,
            self.engine,
            self.log,
            recipe,
            self.feed.steps_per_epoch,
            restored=restored,
            best=world.on_main(lambda: best_evaluation(read_events(events), self.objective.metric)),
            agreement=stop.agreement,
        )
        stack.callback(self.checkpoints.close)

    def _load_weights(self, data_hashes: Mapping[str, str]) -> tuple[CheckpointStore, int | None]:
        """Restore the newest checkpoint, else load the weights of the stage before, else keep the initial ones.

        Returns:
            The store of checkpoints, and the step of the restored one, if any.
        """
        stage, engine, log = self.stage, self.engine, self.log
        resumes = has_checkpoint(stage, self.world)
        received = None if resumes else handoff.receive(stage, engine, self.objective, self.classes)
        engine.attach_components(self.last)
        if received:
            log.write("handoff", step=0, **received.summary())
        if stage.recipe.sparsity and not resumes:
            log.write("sparsity", step=0, densities=start_sparsity(engine, self.objective, self.feed.slots(0)))
        store = open_store(
            stage,
            facts=records.checkpoint_facts(stage.recipe, data_hashes),
            parents=[f"weights of sha256 {received.sha256}"] if received else [],
            on_event=lambda message: log.write("event", level="warning", message=message),
        )
        step = store.restore(engine.state(0)) if resumes else None
        engine.refresh()
        self.guard.restored()
        return store, step

    def run(self) -> Outcome:
        """Train from `start` to `last`, or until the ranks agree to stop: then the state is saved.

        A step that a stop interrupts is discarded, so a resumed run repeats it from its first slot. A state that a
        rollback is due for is never saved, so a resumed run decides on the same rollback.
        """
        step = self.start
        self.stop.at_once()  # a stop may have come during the set-up; ask before waiting for the first batch
        while True:
            due = [] if self.stop.number else self._due(step)
            complete = bool(due or self.stop.number or step == self.last)
            if complete or self.log.is_full:
                skipped = self.log.flush(keep_newest=not complete)
                if (complete or skipped) and self.guard.alarm():
                    if self.stop.number:
                        return Outcome(OutcomeKind.SAVED, f"stopped by {self.stop.reason} before a rollback", step)
                    self.log.flush()  # a step that is journalled after the rollback would count as made again
                    self.watchdog.phase("roll back", step)
                    step = roll_back(self.guard, self.engine, self.checkpoints, self.log)
                    self.log.restart_clock()
                    continue
                if self.profiler.poll(step):
                    self.log.restart_clock()
            for action in due:
                if not self.stop.number:
                    action(step)
                    self.log.restart_clock()
            if self.stop.number or step == self.last:
                return self._save_last(step)
            if not self.guard.skips(step + 1) and not self._train(step):
                continue
            step += 1
            self.profiler.end_step(step)
            self.checkpoints.poll()

    def _train(self, step: int) -> bool:
        """Make the step after `step` finished ones; False if the ranks agreed to stop meanwhile."""
        lr = self._learning_rate(step)
        batches = self.watchdog.batches(self.feed.slots(step), step + 1)
        self.clock.start_step()
        report = self.engine.step(batches, self.objective, step=step, lr=lr, should_stop=self.stop)
        self.clock.end_step()
        if report is None:
            return False
        self.log.add(step + 1, report, lr, self.feed.take_wait())
        if startup.running:
            self.log.write("started", step=step + 1, **startup.end("first step"))
        return True

    def _learning_rate(self, step: int) -> float:
        recipe, steps_per_epoch = self.stage.recipe, self.feed.steps_per_epoch
        return learning_rate(step, recipe.schedule, steps_per_epoch=steps_per_epoch, lr=recipe.learning_rate)

    def _due(self, step: int) -> list[Callable[[int], None]]:
        """What is to be done after `step` and was not done by an earlier attempt, in order. A stop may cut it short."""
        actions: list[Callable[[int], None]] = []
        # Also before the first step, because a rollback may go back to it.
        if step == self.last or self.checkpoints.due(step):
            actions += [self._save, self._report_damaged_images]
        if self._evaluation_due(step):
            actions.append(self._evaluate)
        return actions

    def _save(self, step: int) -> None:
        self.watchdog.phase("save", step)
        self.checkpoints.save(step, why="end" if step == self.last else "due", wait=False)

    def _report_damaged_images(self, step: int) -> None:
        replaced = int(self.world.sum(torch.tensor(self.feed.replaced)))
        if replaced:
            message = f"{replaced} damaged images were replaced in this attempt; each is in its rank's log"
            self.log.write("event", level="warning", message=message, step=step, replaced=replaced)

    def _evaluation_due(self, step: int) -> bool:
        if self.validation is None:
            return False
        every_steps = self.stage.recipe.evaluation.steps_between(self.feed.steps_per_epoch)
        due = step == self.last or (step > 0 and step % every_steps == 0)
        return due and not self.world.on_main(lambda: self.log.has("evaluate", step))

    def _evaluate(self, step: int) -> None:
        self.watchdog.phase("evaluate", step)
        painter = Painter(self.objective, self.stage.recipe.tracking.pictures)
        metrics = evaluate(self.engine, self.objective, self.validation, self.stop, painter, self._announced_once)
        if metrics is not None:
            self._draw(step, painter)
            self.log.write("evaluate", step=step, metrics=metrics)
            self.checkpoints.evaluated(step, metrics[self.objective.metric], self.objective.metric)

    def _announced_once(self) -> AbstractContextManager:
        """Says that blocks are compiled, at the first evaluation of an attempt if it takes long."""
        recipe = self.stage.recipe
        compiles = compiles_blocks(recipe.engine, self.world.device) and not recipe.data.tests_at_own_sizes
        quiet = not compiles or self._has_evaluated or not self.world.is_main
        self._has_evaluated = True
        return (
            nullcontext() if quiet else announced("compiling the blocks of the model for the shapes of the evaluation")
        )

    def _draw(self, step: int, painter: Painter) -> None:
        path = self.stage.directory / PICTURES_FOLDER / f"step-{step:09d}.png"
        if self.log.is_main and painter.draw(path, self.classes):
            self.log.write("picture", step=step, path=str(path.relative_to(self.stage.directory)))

    def _save_last(self, step: int) -> Outcome:
        """Save the state at a stop or after the last step, and wait until it is committed."""
        if self.stop.number:
            self.log.write("stop", step=step, reason=self.stop.reason, asked=round(self.stop.time, 3))
        self.watchdog.phase("save", step)
        self.checkpoints.save(step, why=self.stop.reason if self.stop.number else "end")
        if self.stop.number:
            return Outcome(OutcomeKind.SAVED, f"stopped by {self.stop.reason}", step)
        return Outcome(OutcomeKind.DONE, step=step)

    def finish(self, outcome: Outcome) -> None:
        """Hand on the weights of a stage that is done, mark it done, and record the outcome."""
        done = outcome.kind is OutcomeKind.DONE
        self.watchdog.phase("finish", outcome.step)
        if done:
            weights = handoff.hand_on(self.stage, self.engine, self.last, self.classes, self.category_ids)
            metric, ranks = self.objective.metric, self.world.size
            self.world.on_main(lambda: records.write_result(self.stage, weights, metric, self.log, self.last, ranks))
        self.log.write("end", outcome=outcome.kind, reason=outcome.reason, step=outcome.step)
        self.stage.attempts.record(outcome)
        # Not at a stop, because a grace period is short and importing the plotting library takes a second.
        if self.world.is_main and done:
            pictures.draw_curves(self.stage.directory / JOURNAL_FILE, self.stage.directory / CURVES_FILE)
            self.log.write("picture", step=outcome.step, path=CURVES_FILE)


def _hashes(data: Mapping[str, Subset]) -> dict[str, str]:
    return {name: part.beton.identity for name, part in data.items()}
