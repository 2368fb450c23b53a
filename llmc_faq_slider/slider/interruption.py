"""SIGINT and SIGTERM end a run after the step at hand, not in the middle of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType

__all__ = ["StopRequest", "stop_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """
    :param signal: the signal that asks to stop, None for none
    """

    signal: Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def exit(self) -> BaseException:
        """What the signal would have raised: the shell sees the usual status."""
        if self.signal == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + (self.signal or 0))


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """
    Context in which the first SIGINT or SIGTERM is noted; a second one acts at once.

    Outside the main thread signals stay what they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored, as SIGINT in the background, stays ignored.
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = Signals(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
