"""Stops requested by a signal: the handler sets an integer, and the ranks agree on it between slots."""

import signal
import time
from collections.abc import Callable

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

    Attributes:
        number: the agreed signal; 0 while there is none.
        time: when the first rank received it, in epoch seconds.
    """

    def __init__(self, request: StopRequest, agree: Callable[[int], int]):
        self._request, self._agree = request, agree
        self.number, self.time = 0, 0.0

    def __call__(self) -> bool:
        """Return True once any rank has received a stop signal."""
        if not self.number and (number := self._agree(self._request.number)):
            now = time.time()
            own = self._request.time or now
            self.number, self.time = number, now - self._agree(int((now - own) * 1000)) / 1000
        return self.number != 0

    @property
    def reason(self) -> str:
        """The name of the agreed signal."""
        return signal_name(self.number)
