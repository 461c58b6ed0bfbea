"""A stop asked for by a signal. The handler sets an integer; the ranks agree on it between slots."""

import signal
from collections.abc import Callable


class StopRequest:
    """The number of the signal that asked for a stop; 0 while none did."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.number = 0

    def install(self) -> "StopRequest":
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        # A launcher may have blocked them so that none is lost before this moment.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number


def signal_name(number: int) -> str:
    """ "SIGTERM" for 15."""
    return signal.Signals(number).name


class AgreedStop:
    """The ranks' common answer to "shall we stop?". Every rank must ask equally often: `agree` is collective."""

    def __init__(self, request: StopRequest, agree: Callable[[int], int]):
        self._request, self._agree = request, agree
        self.number = 0

    def __call__(self) -> bool:
        self.number = self.number or self._agree(self._request.number)
        return self.number != 0

    @property
    def reason(self) -> str:
        """The agreed signal's name."""
        return signal_name(self.number)
