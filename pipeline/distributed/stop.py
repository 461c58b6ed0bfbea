"""A stop asked for by a signal. The handler sets an integer; the ranks agree on it between slots."""

import signal
import time
from collections.abc import Callable

# A person, a time limit or a preemption asks for a stop with any of these.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """The number of the signal that asked for a stop, 0 while none did, and when it came (epoch seconds)."""

    def __init__(self) -> None:
        self.number, self.time = 0, 0.0

    def install(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # A launcher may have blocked them so that none is lost before this moment.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _note(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.time = number, time.time()


def signal_name(number: int) -> str:
    """ "SIGTERM" for 15."""
    return signal.Signals(number).name


class AgreedStop:
    """The ranks' common answer to "shall we stop?". Every rank must ask equally often: `agree` is collective.

    Attributes:
        number: the agreed signal, 0 while there is none.
        asked: when the first rank got it, in epoch seconds.
    """

    def __init__(self, request: StopRequest, agree: Callable[[int], int]):
        self._request, self._agree = request, agree
        self.number, self.asked = 0, 0.0

    def __call__(self) -> bool:
        if not self.number and (number := self._agree(self._request.number)):
            now = time.time()
            own = self._request.time or now
            self.number, self.asked = number, now - self._agree(int((now - own) * 1000)) / 1000
        return self.number != 0

    @property
    def reason(self) -> str:
        """The agreed signal's name."""
        return signal_name(self.number)
