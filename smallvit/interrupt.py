"""Signals that end a run: the first one waits for the step at hand."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from smallvit.errors import InputError, TrainingError

TWICE_SECONDS = 0.5
"""Signals closer together are one: a terminal, torchrun and Slurm may all send the same."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run: the first one after it was saved, the second at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Notes SIGINT and SIGTERM instead of obeying; a second SIGINT interrupts at once.

    What fails after a signal, and nobody foresaw, is an interruption too.
    """

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
        unforeseen = isinstance(error, Exception) and not isinstance(error, (InputError, TrainingError, OSError))
        if self.received and unforeseen:
            raise Interrupted(self.received) from error  # a terminal ends the compilers that torch has started, too

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.since > TWICE_SECONDS:
                raise Interrupted(number)
            return
        self.received, self.since = number, time.monotonic()
        name = signal.Signals(number).name
        os.write(2, f"smallvit: {name}: ends the step and saves; Ctrl-C then stops at once\n".encode())
