"""The rules by which a stage is finished, retried or given up, on facts that are written down."""

import pytest

from cluster.slurm.decision import Action, JobEnd, choose_exclusion, decide, dependent_stages
from pipeline.stage.outcome import SrunCode

CRASHED, PERMANENT = int(SrunCode.CRASHED), int(SrunCode.PERMANENT)
NOTHING_NEW = "3 attempts in a row committed no step after {}: lost"
BAD = {"n3": "disk: full"}


@pytest.mark.parametrize(
    ("facts", "action", "reason"),
    [
        ({"done": True}, Action.FINISH, ""),
        ({"done": True, "off_track": "top1 is low"}, Action.FAIL, "top1 is low"),
        ({"done": True, "code": PERMANENT, "overtaken": "attempt 3 on n2"}, Action.FINISH, ""),
        ({"overtaken": "attempt 3 on n2", "cancelled": True}, Action.LEAVE, "attempt 3 on n2 has taken over"),
        ({"cancelled": True, "code": PERMANENT}, Action.STOP, "cancelled"),
        ({"code": PERMANENT, "recorded": "no such file"}, Action.FAIL, "no such file"),
        ({"code": PERMANENT, "held": "process 5 runs it"}, Action.LEAVE, "process 5 runs it"),
        ({"held": "process 5 runs it", "recorded": "lost"}, Action.RETRY, "lost"),
        ({}, Action.RETRY, "the ranks ended with exit code 70 and recorded no reason"),
        ({"bad_nodes": BAD, "recorded": "no"}, Action.RETRY, "n3 is a bad node (disk: full)"),
        ({"starts": (-1, -1)}, Action.RETRY, "the ranks ended with exit code 70 and recorded no reason"),
        ({"starts": (5, -1, -1, -1), "recorded": "lost"}, Action.FAIL, NOTHING_NEW.format(-1)),
        ({"starts": (5, 5, 5), "committed": 6, "recorded": "lost"}, Action.RETRY, "lost"),
        ({"code": 0, "starts": (6, 6, 6), "committed": 6, "recorded": "lost"}, Action.FAIL, NOTHING_NEW.format(6)),
    ],
)  # fmt: skip
def test_what_becomes_of_a_stage(facts, action, reason):
    end = JobEnd(**{"code": CRASHED, "most_without_progress": 3, **facts})
    decision = decide(end)
    assert (decision.action, decision.reason) == (action, reason)
    assert decide(JobEnd(**end.record())) == decision  # a recorded end is decided alike


@pytest.mark.parametrize(
    ("found", "spare", "excluded"),
    [
        ([{"n2"}, {"n1"}], 2, {"n1", "n2"}),
        ([{"n2"}, {"n1"}], 1, {"n2"}),  # the one that was bad just now
        ([{"n2"}, {"n1"}], 0, set()),
        ([set(), {"n2"}, set(), {"n1"}], 1, {"n2"}),
        ([{"n3"}, {"n2"}, {"n1"}], 2, {"n2", "n3"}),  # not n3 alone: n2 is still bad, and n1 may be repaired
        ([{"n2"}, {"n2"}], 1, {"n2"}),
        ([], 9, set()),
    ],
)
def test_nodes_are_excluded_as_far_as_the_job_can_do_without_them(found, spare, excluded):
    assert choose_exclusion(found, lambda nodes: len(nodes) <= spare) == excluded


def test_stages_that_depend_on_a_failed_one():
    previous = {"a": None, "b": "a", "c": "b", "d": None}
    assert dependent_stages(previous, "a") == {"b", "c"}
    assert dependent_stages(previous, "d") == set()
