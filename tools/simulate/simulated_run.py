"""A discrete-event simulation of a chain of stages on Slurm, which decides by the code that decides about real jobs.

The program's own are the decisions: what becomes of a job that ended (`decide`), which nodes are excluded
(`choose_exclusion`), when a stage stops before its time limit (`StopTime`), which checkpoints are kept
(`checkpoints_to_keep`) and which one is resumed (`newest_usable`). Invented are the clock, Slurm, the nodes and the
training. An event is an end of an attempt, so that a month of an hourly preempted job takes milliseconds.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from cluster.slurm.decision import Action, JobEnd, choose_exclusion, decide, dependent_stages
from cluster.slurm.time_limit import StopTime
from pipeline.checkpoint.fallback import newest_usable
from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.retention import checkpoints_to_keep
from pipeline.errors import CheckpointError
from pipeline.stage.outcome import SrunCode
from tools.simulate.conditions import Conditions
from tools.simulate.simulated_cluster import HOUR, SimulatedCluster
from tools.simulate.stage_work import AttemptProgress, StageWork

LONGEST_SECONDS = 3 * 365 * 24 * HOUR  # a run that is not done by then is given up
WEEK_SECONDS = 7 * 24 * HOUR


@dataclass
class Ledger:
    """Where the time of a job's nodes went, in seconds. All but `queue` is allocated."""

    useful: float = 0.0
    """Steps that count in the end, and their evaluations."""
    start: float = 0.0
    lost: float = 0.0
    """Steps that no checkpoint kept."""
    saves: float = 0.0
    """Training held up by saves."""
    ending: float = 0.0
    """From a failure or the notice of a stop to the end of the job, with the save that is waited for."""
    queue: float = 0.0
    """Waits before starts, which are not allocated."""

    @property
    def allocated(self) -> float:
        return self.useful + self.start + self.lost + self.saves + self.ending

    @property
    def useful_share(self) -> float:
        return self.useful / self.allocated if self.allocated else 0.0

    def add(self, other: "Ledger", weight: float = 1.0) -> None:
        """Add another ledger, its seconds multiplied by `weight`."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + weight * getattr(other, item.name))


@dataclass
class SimulatedStage:
    """What became of a stage."""

    work: StageWork
    action: Action | None = None
    """FINISH or FAIL; None if the stage was cancelled or never ended."""
    reason: str = ""
    attempts: int = 0
    """Starts of the job."""
    ended_seconds: float = 0.0
    """When it ended, since the submission of the chain."""
    ledger: Ledger = field(default_factory=Ledger)


def simulate_run(stages: Sequence[StageWork], conditions: Conditions, seed: int) -> list[SimulatedStage]:
    """Simulate a chain from its submission to its end; equal arguments give equal results."""
    draw = random.Random(seed)
    nodes = max(stage.nodes for stage in stages) + conditions.spare_nodes
    cluster = SimulatedCluster(nodes, conditions.repair_hours * HOUR)
    previous = {stage.name: stage.previous for stage in stages}
    cancelled: set[str] = set()
    told = []
    for work in stages:
        result = SimulatedStage(work)
        told.append(result)
        if work.name not in cancelled:
            _StageJob(result, conditions, cluster, draw).run()
            result.ended_seconds = cluster.clock
        if result.action is not Action.FINISH:
            cancelled |= dependent_stages(previous, work.name)
    return told


def simulated_share(work: StageWork, conditions: Conditions, runs: int = 10) -> float:
    """Useful time divided by allocated time of one stage; of the first week of a longer one."""
    steps = min(work.steps, max(round(WEEK_SECONDS / work.step_seconds), 1))
    total = Ledger()
    for seed in range(runs):
        total.add(simulate_run([replace(work, steps=steps, previous=None)], conditions, seed)[0].ledger)
    return total.useful_share


class _StageJob:
    """The job of a stage: it is started until the decision about one of its ends is not to retry."""

    def __init__(self, result: SimulatedStage, conditions: Conditions, cluster: SimulatedCluster, draw: random.Random):
        self.result, self.work, self.ledger = result, result.work, result.ledger
        self.conditions, self.cluster, self.draw = conditions, cluster, draw
        self.checkpoints: set[CheckpointName] = set()
        self.committed, self.counted = -1, 0  # the newest step by the journal; the steps that are useful up to now
        self.starts = [-1]
        self.bad: list[set[str]] = []  # nodes that the starts of the job found bad, the newest first
        self.excluded: set[str] = set()

    def run(self) -> None:
        while self.cluster.clock < LONGEST_SECONDS:
            end = self._start()
            if end is None:
                continue  # Slurm itself requeued the job, as after the loss of a node
            decision = decide(end)
            if decision.action is not Action.RETRY:
                self.result.action, self.result.reason = decision.action, decision.reason
                return
            if end.bad_nodes:
                self.bad.insert(0, set(end.bad_nodes))
            if self.bad:
                self.excluded = choose_exclusion(self.bad, self._can_do_without)
            self.starts.append(end.committed)

    def _can_do_without(self, nodes: "set[str]") -> bool:
        return len(self.cluster.in_service(nodes)) >= self.work.nodes

    def _start(self) -> JobEnd | None:
        """One start of the job, from the queue to its end; None if Slurm requeues it without asking."""
        conditions, cluster = self.conditions, self.cluster
        began = cluster.clock
        cluster.clock += self._wait(1 / conditions.queue_seconds) if conditions.queue_seconds else 0.0
        nodes = cluster.allocate(self.work.nodes, self.excluded)
        self.ledger.queue += cluster.clock - began
        self.result.attempts += 1
        if bad := cluster.bad(nodes):
            self._spend("start", conditions.preflight_seconds)
            return self._end(SrunCode.BAD_NODE, bad_nodes=bad)
        try:
            resumed = self._restored_step()
        except CheckpointError as error:
            self._spend("start", conditions.preflight_seconds)
            return self._end(SrunCode.PERMANENT, recorded=str(error))
        return self._attempt(nodes, resumed)

    def _attempt(self, nodes: Sequence[str], resumed: int) -> JobEnd | None:
        """An attempt: its start, its steps until it is done or disturbed, and its end."""
        conditions, work = self.conditions, self.work
        start = self.draw.choice(conditions.start_seconds)
        failure = self._wait(len(nodes) * conditions.failures_per_node_day / (24 * HOUR))
        preemption = self._wait(conditions.preemptions_per_hour / HOUR)
        limit = self._stop_before_limit(start, resumed)
        done = start + work.seconds_until(resumed, work.steps)
        seconds = min(failure, preemption, limit, done)
        if seconds == done:
            self._train(resumed, start, work.progress(resumed, done - start), work.steps)
            self._spend("ending", work.save_seconds + conditions.exit_seconds)
            return self._end(SrunCode.DONE, done=True)
        reached = self._train_until(resumed, start, seconds)
        if seconds == failure:
            return self._fail(self.draw.choice(nodes))
        room = conditions.grace_seconds if seconds == preemption else work.limit_seconds - seconds
        return self._stop(resumed, reached, room, preempted=seconds == preemption)

    def _train_until(self, resumed: int, start: float, seconds: float) -> AttemptProgress | None:
        """Count what an attempt has done when it is disturbed; None if it was still starting."""
        if seconds < start:
            self._spend("start", seconds)
            return None
        progress = self.work.progress(resumed, seconds - start)
        self._train(resumed, start, progress, max(progress.committed, default=resumed))
        return progress

    def _train(self, resumed: int, start: float, progress: AttemptProgress, kept: int) -> None:
        """Count the start and the steps of an attempt, of which those up to `kept` have a checkpoint."""
        self._spend("start", start)
        self._spend("saves", progress.blocked_seconds)
        self._spend("useful", (kept - resumed) * self.work.step_seconds)
        self._spend("lost", (progress.step - kept) * self.work.step_seconds + progress.partial_seconds)
        self.counted = kept
        for step in progress.committed:
            self._commit(step)
            self._prune()

    def _fail(self, node: str) -> JobEnd | None:
        conditions, kind = self.conditions, self.draw.random()
        if kind < conditions.lost_share:
            self._spend("ending", conditions.notice_seconds)
            self.cluster.lose(node)
            return None
        hangs = kind < conditions.lost_share + conditions.hang_share
        self._spend("ending", conditions.stall_seconds if hangs else conditions.notice_seconds)
        if self.draw.random() < conditions.bad_share:
            self.cluster.spoil(node)
        return self._end(SrunCode.CRASHED, recorded="the ranks lost each other")

    def _stop(self, resumed: int, reached: AttemptProgress | None, room: float, *, preempted: bool) -> JobEnd | None:
        """A stop with notice: the state is saved if there is time."""
        exit_seconds = self.conditions.exit_seconds
        if reached is None:
            self._spend("ending", min(exit_seconds, room))
            return self._end(SrunCode.SAVED, recorded="stopped during the start")
        saved = max(reached.committed, default=resumed)
        save_seconds = self.work.save_seconds if reached.step > saved else 0.0
        if save_seconds + exit_seconds > room:
            self._spend("ending", room)
            return None if preempted else self._end(SrunCode.CRASHED, recorded="killed at the time limit")
        self._spend("ending", save_seconds + exit_seconds)
        regained = (reached.step - saved) * self.work.step_seconds
        self.ledger.lost -= regained
        self.ledger.useful += regained
        self.counted = reached.step
        self._commit(reached.step)  # nothing is pruned at a stop
        return self._end(SrunCode.SAVED, recorded="stopped")

    def _stop_before_limit(self, start: float, resumed: int) -> float:
        """When the stage stops by itself, or is told to, after the start of its job."""
        work = self.work
        if math.isinf(work.limit_seconds):
            return math.inf
        watch = StopTime()
        watch.add({"kind": "attempt", "global_batch": 1})
        watch.add({"kind": "step", "images_per_second": 1 / work.step_seconds})
        before = watch.stop_at(0.0, work.limit_seconds)
        if work.progress(resumed, before - start).committed:
            watch.add({"kind": "save", "seconds": work.save_seconds})
        return min(watch.stop_at(0.0, work.limit_seconds), work.limit_seconds - work.stop_before_end_seconds)

    def _restored_step(self) -> int:
        """The step that an attempt resumes at. Steps that only a damaged checkpoint kept are lost."""
        if not self.checkpoints:
            return 0

        def newest() -> CheckpointName:
            if not self.checkpoints:
                raise CheckpointError("no usable checkpoint is left")
            return max(self.checkpoints)

        def verify(name: CheckpointName) -> list[str]:
            return ["simulated damage"] if self.draw.random() < self.conditions.damaged_share else []

        name = newest_usable(
            newest, verify, lambda name, problems: self.checkpoints.discard(name), self.work.most_fallbacks
        )
        lost = (self.counted - name.step) * self.work.step_seconds
        self.ledger.useful -= lost
        self.ledger.lost += lost
        self.counted = name.step
        return name.step

    def _commit(self, step: int) -> None:
        self.checkpoints.add(CheckpointName(self.result.attempts, step))
        self.committed = max(self.committed, step)

    def _prune(self) -> None:
        if len(self.checkpoints) > self.work.keep_last:
            self.checkpoints = checkpoints_to_keep(
                self.checkpoints,
                keep_last=self.work.keep_last,
                keep_every=None,
                reach_steps=self.work.reach_steps,
            )

    def _end(self, code: SrunCode, **facts: object) -> JobEnd:
        most = self.work.most_without_progress
        return JobEnd(code, most, committed=self.committed, starts=self.starts[-most:], **facts)

    def _spend(self, account: str, seconds: float) -> None:
        setattr(self.ledger, account, getattr(self.ledger, account) + seconds)
        self.cluster.clock += seconds

    def _wait(self, rate: float) -> float:
        """The time until an event that comes so often per second."""
        return self.draw.expovariate(rate) if rate else math.inf
