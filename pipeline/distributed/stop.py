"""Stops requested by a signal: the handler sets an integer, and `pipeline.distributed.agreement` shares it."""

import signal
import time

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
