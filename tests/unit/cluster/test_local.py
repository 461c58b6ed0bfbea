"""A stage on this machine is retried within the bound that it has on Slurm."""

import json
from pathlib import Path

import pytest

from cluster.local import retrying
from pipeline.stage.outcome import Outcome, OutcomeKind

LOST, DONE = Outcome(OutcomeKind.BAD_NODE, "rank 1 was lost"), Outcome(OutcomeKind.DONE)
SAVED, FAILED = Outcome(OutcomeKind.SAVED), Outcome(OutcomeKind.PERMANENT, "no")


class Attempts:
    """Stands in for the launcher: each attempt ends as told, after it has saved the step of that attempt."""

    def __init__(self, *ends: tuple[Outcome, int], stopped_after: int = 99):
        self.ends, self.count, self.stopped_after = ends, 0, stopped_after

    @property
    def stopped(self) -> bool:
        return self.count >= self.stopped_after

    def run(self, stage: Path) -> Outcome:
        outcome, step = self.ends[min(self.count, len(self.ends) - 1)]
        self.count += 1
        with open(stage / "journal.jsonl", "a") as journal:
            journal.write(json.dumps({"kind": "save", "step": step}) + "\n")
        return outcome


@pytest.mark.parametrize(
    ("launcher", "kind", "attempts"),
    [
        (Attempts((DONE, 9)), OutcomeKind.DONE, 1),
        (Attempts((FAILED, 0)), OutcomeKind.PERMANENT, 1),
        (Attempts((LOST, 5), (DONE, 9)), OutcomeKind.DONE, 2),
        (Attempts((LOST, 5), (SAVED, 9)), OutcomeKind.SAVED, 2),
        (Attempts((LOST, 0)), OutcomeKind.BAD_NODE, 3),  # the first saves step 0, the next two nothing new
        (Attempts((LOST, 1), (LOST, 1), (LOST, 2), (LOST, 2), (LOST, 3), (DONE, 4)), OutcomeKind.DONE, 6),
        (Attempts((LOST, 5), stopped_after=1), OutcomeKind.BAD_NODE, 1),  # two signals kill the ranks
    ],
)
def test_what_was_lost_is_retried_while_steps_are_saved(tmp_path, launcher, kind, attempts):
    said: list[str] = []
    outcome = retrying(launcher, said.append)(tmp_path)
    assert (outcome.kind, launcher.count) == (kind, attempts)
    assert len(said) == attempts - 1
    assert all(sentence == f"{tmp_path.name}: rank 1 was lost; it is retried" for sentence in said)
    if attempts == 3:
        assert outcome.reason == "rank 1 was lost; 3 attempts in a row saved nothing new"
