"""A run trained by a process of its own: its memory, what it compiles and how it ends are its own. Needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from smallvit.interrupt import Interrupted, Signals


class Relay(Signals):
    """Passes SIGINT and SIGTERM on to a process; a terminal sends them there itself, too, which counts once."""

    process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start the process."""
        self.process = subprocess.Popen(command)
        if self.received:
            self.process.send_signal(self.received)
        return self.process

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.process is not None:
            self.process.send_signal(number)


def train(options: dict[str, Any], folder: Path) -> int:
    """Train in `folder`, from the start or from where a run there left off; returns the process's exit code.

    `options` are what `Config.build` takes. What the process writes goes to the terminal.

    Raises:
        Interrupted: a signal ended it; the run is saved.
    """
    with TemporaryDirectory() as place, Relay() as relay:
        file = Path(place, "config.json")
        file.write_text(json.dumps(options))
        flags = ["--config", str(file), "--out", str(folder), "--auto-resume"]
        code = relay.start([sys.executable, "-P", "-m", "smallvit", "train", *flags]).wait()
    if relay.received or code in (130, 143):
        raise Interrupted(relay.received or code - 128)
    return code
