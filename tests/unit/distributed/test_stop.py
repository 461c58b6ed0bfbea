"""Stop requests: the first signal of any rank stops all of them, and its time is known."""

import os
import signal
import time

import pytest

from pipeline.distributed.agreement import AgreedStop, Agreement, Topic
from pipeline.distributed.stop import STOP_SIGNALS, StopRequest


@pytest.fixture
def request_for_stop():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopRequest().install()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_counts_and_is_dated(request_for_stop):
    stop = AgreedStop(request_for_stop, Agreement())
    assert not stop()
    before = time.time()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    after = time.time()
    time.sleep(0.05)  # the ranks agree later, between two slots
    assert stop()
    assert (stop.number, stop.reason) == (signal.SIGUSR1, "SIGUSR1")
    assert before - 0.002 <= stop.time <= after + 0.002


def test_a_rank_that_got_none_believes_the_others_one_call_later(request_for_stop):
    from_other_ranks = iter([[0, 0], [signal.SIGTERM, 3000]])  # no signal, then one that is 3 s (3000 ms) old
    agreement = Agreement(lambda own: [*map(max, own, next(from_other_ranks)), *own[2:]])
    stop = AgreedStop(request_for_stop, agreement)
    assert not stop()
    before = time.time()
    assert not stop(), "the answer is that of the call before"
    after = time.time()
    assert stop()
    assert before - 3 <= stop.time <= after - 3
    assert stop()  # without another agreement
    assert agreement.agreed[Topic.STOP] == signal.SIGTERM


def test_what_is_asked_at_once_is_answered_by_that_very_agreement(request_for_stop):
    from_other_ranks = iter([0, 0, signal.SIGTERM])
    stop = AgreedStop(request_for_stop, Agreement(lambda own: [max(own[0], next(from_other_ranks)), *own[1:]]))
    assert not stop()
    assert not stop.at_once()  # hears the first, says and hears the second
    assert stop.at_once()
