"""Signals that end a run: the first one waits for the step at hand."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, after it was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Notes SIGINT and SIGTERM instead of obeying; a second one interrupts at once."""

    received = 0
    """Number of the signal, if one came."""

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # others may not
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        os.write(2, f"smallvit: {signal.Signals(number).name}: ends the step and saves; again stops at once\n".encode())
