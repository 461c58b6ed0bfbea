"""Simulated runs: where the time goes, how they end, and that the program's own rules decide."""

import random
from dataclasses import replace

import pytest

from cluster.slurm.decision import Action
from tools.simulate.conditions import Conditions
from tools.simulate.simulated_run import LONGEST_SECONDS, Ledger, SimulatedStage, simulate_run
from tools.simulate.stage_work import StageWork

HOUR, DAY = 3600.0, 24 * 3600.0
CALM = Conditions(failures_per_node_day=0.0, queue_seconds=0.0, start_seconds=(100.0,))
WORK = StageWork("pretrain", 1000, 10.0, 100, nodes=4, blocked_seconds=2.0, save_seconds=30.0)
MONTH = replace(WORK, steps=round(28 * DAY / 10), save_every_steps=90, limit_seconds=DAY, stop_before_end_seconds=300.0)


def test_nothing_happens_to_an_undisturbed_stage():
    [result] = simulate_run([WORK], CALM, seed=0)
    assert (result.action, result.attempts) == (Action.FINISH, 1)
    # Ten saves, from that of step 0 to that of step 900; the last one is waited for.
    assert result.ledger == Ledger(useful=10_000.0, start=100.0, saves=20.0, ending=35.0)


@pytest.mark.parametrize("start", [0, 1, 99, 100, 250, 999])
def test_progress_is_what_a_loop_over_the_steps_would_count(start):
    work, draw = replace(WORK, blocked_seconds=7.0, save_seconds=1004.0), random.Random(start)  # saves wait for saves
    for seconds in [0.0, 1.0, 10.0, 1e9, *(draw.uniform(0, 12_000) for _ in range(60))]:
        step, clock, blocked, saves = start, 0.0, 0.0, []
        while True:
            if step % 100 == 0 and step < 1000 and (step > start or step == 0):
                saves.append((step, clock))
                blocked += min(work.held_up_seconds, seconds - clock)
                clock += work.held_up_seconds
            if clock + 10 > seconds + 1e-6 or step == 1000:
                break
            step, clock = step + 1, clock + 10
        committed = [number for number, begun in saves if begun + work.save_seconds <= seconds]
        progress = work.progress(start, seconds)
        assert progress.step == step
        assert list(progress.committed) == committed[-len(progress.committed) or len(committed) :]
        assert max(progress.committed, default=None) == max(committed, default=None)
        assert progress.blocked_seconds == pytest.approx(blocked, abs=1e-3)
        if step == 1000:
            assert work.seconds_until(start, 1000) == pytest.approx(clock)
        else:
            assert progress.partial_seconds == pytest.approx(seconds - (step - start) * 10 - blocked, abs=1e-3)


def drawn_conditions(seed: int) -> Conditions:
    draw = random.Random(seed)
    return Conditions(
        failures_per_node_day=draw.choice([0.0, 0.005, 0.05, 1.0]),
        preemptions_per_hour=draw.choice([0.0, 0.1, 1.0]),
        queue_seconds=draw.choice([0.0, 600.0]),
        start_seconds=tuple(draw.uniform(30, 900) for _ in range(3)),
        grace_seconds=draw.choice([0.0, 60.0]),
        spare_nodes=draw.randint(0, 4),
        damaged_share=draw.choice([0.0, 0.0, 0.02]),
    )


def check_end(result: SimulatedStage) -> None:
    """The run ended as the rules prescribe, and each second is accounted for once."""
    ledger, work = result.ledger, result.work
    bounds = ("3 attempts in a row committed no step", "4 checkpoints are damaged", "no usable checkpoint is left")
    assert all(value >= -1e-3 for value in vars(ledger).values()), ledger
    assert ledger.allocated + ledger.queue == pytest.approx(result.ended_seconds)
    if result.action is Action.FINISH:
        assert ledger.useful == pytest.approx(work.steps * work.step_seconds)
    elif result.action is Action.FAIL:
        assert result.reason.startswith(bounds)
        assert ledger.useful < work.steps * work.step_seconds
    else:  # nothing kept a step, and Slurm requeued the job itself each time
        assert result.ended_seconds >= LONGEST_SECONDS


MONTHS = 200


def test_simulated_months_end_as_the_rules_prescribe():
    ends = []
    for seed in range(MONTHS):
        [result] = simulate_run([MONTH], drawn_conditions(seed), seed)
        check_end(result)
        ends.append(result.action)
    assert ends.count(Action.FINISH) > MONTHS / 3
    assert ends.count(Action.FAIL) > MONTHS / 10


def test_equal_seeds_give_equal_runs():
    conditions = Conditions(failures_per_node_day=0.05, preemptions_per_hour=1.0)
    assert simulate_run([MONTH], conditions, 3) == simulate_run([MONTH], conditions, 3)
    assert simulate_run([MONTH], conditions, 3) != simulate_run([MONTH], conditions, 4)


def test_a_failed_stage_takes_its_dependents_along():
    doomed = replace(WORK, limit_seconds=120.0)  # never comes to a step
    other, after = replace(WORK, name="other"), replace(WORK, name="finetune", previous="pretrain")
    first, second, third = simulate_run([doomed, after, other], replace(CALM, start_seconds=(200.0,)), seed=0)
    assert (first.action, first.attempts) == (Action.FAIL, 3)
    assert (second.action, second.attempts) == (None, 0)
    assert third.action is Action.FINISH


def test_stops_with_notice_lose_nothing_and_kills_lose_what_was_not_saved():
    hourly = replace(CALM, preemptions_per_hour=1.0)
    kept = simulate_run([replace(MONTH, most_without_progress=99)], hourly, 1)[0].ledger
    assert kept.lost / kept.allocated < 0.005  # the step that a stop interrupts
    lost = simulate_run([replace(MONTH, most_without_progress=99)], replace(hourly, grace_seconds=0.0), 1)[0].ledger
    assert 0.05 < lost.lost / lost.allocated < 0.2  # half of 15 minutes and a save of each hour


def test_the_newest_bad_nodes_are_excluded_first():
    """Nodes that were bad long ago are repaired. A rule that excludes all of them or the last one alone lets two bad
    nodes take turns, which fails the stage."""
    conditions = Conditions(failures_per_node_day=0.05, queue_seconds=0.0, bad_share=1.0, lost_share=0.0)
    work = replace(MONTH, nodes=16)
    ends = [simulate_run([work], conditions, seed)[0].action for seed in range(8)]
    assert ends.count(Action.FINISH) >= 6
