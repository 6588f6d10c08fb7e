"""Handle SIGINT and SIGTERM: finish the current step before the run is saved and stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from smallvit.utils.errors import InputError, TrainingError

TWICE_SECONDS = 0.5
"""Signals closer together count as one: a terminal, torchrun and Slurm may all send the same."""


class SignalInterrupt(KeyboardInterrupt):
    """A signal stopped the run: the first one after saving, the second immediately."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalHandler:
    """Record SIGINT and SIGTERM for the training loop; a second SIGINT interrupts immediately.

    Unexpected errors after a signal are raised as an interruption too.
    """

    received = 0
    """Number of the signal received, or 0."""

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            self._before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        unexpected = isinstance(error, Exception) and not isinstance(error, (InputError, TrainingError, OSError))
        if self.received and unexpected:
            raise SignalInterrupt(self.received) from error  # a terminal's Ctrl-C ends torch's compiler processes too

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, or interrupt immediately on a second SIGINT."""
        if self.received:
            if number == signal.SIGINT and time.monotonic() - self.since > TWICE_SECONDS:
                raise SignalInterrupt(number)
            return
        self.received, self.since = number, time.monotonic()
        name = signal.Signals(number).name
        message = "finishing the current step and saving. Press Ctrl-C again to stop immediately."
        os.write(2, f"smallvit: {name} received: {message}\n".encode())
