"""Stops requested by a signal: the handler sets an integer, and the ranks agree on it between slots."""

import signal
import time
from collections.abc import Callable

from pipeline.distributed.agreement import Agreement, Topic

# Each of these requests a stop: they are sent by a person, at a time limit or by a preemption.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """This process's first stop signal.

    Attributes:
        number: of the signal; 0 before it arrives.
        time: of its arrival, in epoch seconds.
    """

    def __init__(self) -> None:
        self.number, self.time = 0, 0.0

    def install(self) -> "StopRequest":
        """Handle the stop signals of this process, and return self."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # A launcher blocks the signals, so that none is lost before this moment.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _note(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.time = number, time.time()


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGTERM."""
    return signal.Signals(number).name


class AgreedStop:
    """Whether the ranks stop: a call returns the same answer on all ranks, and is collective.

    Args:
        request: of this process.
        agreement: of all ranks; what else is agreed on travels with the stop.
        meeting: wraps the wait for the other ranks, as `Watchdog.meeting` does.

    Attributes:
        number: the agreed signal; 0 while there is none.
        time: when the first rank received it, in epoch seconds.
    """

    def __init__(
        self,
        request: StopRequest,
        agreement: Agreement,
        meeting: Callable[[Callable[[], list[int]]], Callable[[], list[int]]] = lambda read: read,
    ):
        self.agreement = agreement
        self._request, self._read = request, meeting(agreement.read)
        self._begun = 0.0
        self.number, self.time = 0, 0.0

    def __call__(self) -> bool:
        """Return True once any rank had received a stop signal when this was last called.

        So the answer is one micro-batch old, and no rank waits for the agreement of the others.
        """
        if not self.number:
            self._hear()
        if not self.number:
            self._say()
            if self.agreement.is_immediate:
                self._hear()
        return self.number != 0

    def at_once(self) -> bool:
        """Return True if any rank has received a stop signal by now; waits for the slowest rank."""
        if not self():
            self._hear()
        return self.number != 0

    def _say(self) -> None:
        self._begun, own = time.time(), self._request.time
        self.agreement.own[Topic.STOP] = self._request.number
        self.agreement.own[Topic.STOP_AGE] = int((self._begun - own) * 1000) if own else 0
        self.agreement.begin()

    def _hear(self) -> None:
        agreed = self._read()
        if agreed[Topic.STOP]:
            self.number, self.time = agreed[Topic.STOP], self._begun - agreed[Topic.STOP_AGE] / 1000

    @property
    def reason(self) -> str:
        """The name of the agreed signal."""
        return signal_name(self.number)
