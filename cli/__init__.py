"""The command line: one thin file per verb, imported when the verb is called."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from smallvit import __version__
from smallvit.errors import DivergedError, InputError, OthersEndedError, TrainingError, nearest

VERBS = {
    "train": "train a model and write its run folder",
    "watch": "draw a run's curves in the terminal while it trains",
    "eval": "judge a trained model: accuracy with its interval, each class, calibration, robustness",
    "predict": "classify images: the likeliest classes and their probabilities",
    "attend": "draw where a trained model looks: attention maps, rollout, relevance, temperatures",
    "report": "write a run, or several, as one HTML page",
    "reproduce": "do a published experiment again, and set it beside the published figures",
    "compare": "train what is missing, and set models side by side: accuracy, size, speed",
    "profile": "measure what models cost: parameters, operations, memory, latency, throughput",
    "export": "write a trained model for other programs: ONNX, torch.export, timm, the Hugging Face Hub",
    "probe": "judge a trained model's features on other data: linear classifier, nearest neighbours",
    "show": "write a picture of augmented training images, as the model sees them",
    "list": "list what has a name: architectures, recipes, experiments, data sets, plugins, augmentation",
    "coverage": "show which of timm's models SPT and LSA can patch",
    "completion": "print what makes a shell complete smallvit's verbs and options",
}

_VERB_LINES = "\n".join(f"  {verb:10} {summary}" for verb, summary in VERBS.items())

USAGE = f"""\
usage: smallvit VERB [OPTIONS]

Vision Transformers that learn from small image sets.

{_VERB_LINES}

  smallvit train --arch vit --spt --lsa               the embedded handwritten digits
  smallvit train --arch vit --spt --lsa --data DIR    a folder of class folders
  smallvit watch runs/vit-spt-lsa-digits              its curves, live
  smallvit eval runs/vit-spt-lsa-digits               how good it is, and how sure that is
  smallvit attend runs/vit-spt-lsa-digits             where it looks
  smallvit predict runs/vit-spt-lsa-digits DIR        what it says to images
  smallvit report runs/vit-spt-lsa-digits             all of it as one page
  smallvit compare --arch vit --ablation --seeds 2    plain, with each plugin, with both
  smallvit list archs                                 what --arch takes
  smallvit VERB --help                                a verb's options, and examples
  smallvit --version

Exit codes: 0 done, 1 failed, 2 bad input (one line says what, where and what to do), 130 interrupted, 141 nobody
reads the output, 143 terminated.
"""
UNREAD = 141
"""What a shell says of programs that end so."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 unread, 143 terminated."""
    _open_streams()
    try:
        try:
            with _interruptible():
                return _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # now, while what goes wrong can be told
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's answer to it
            return UNREAD
        raise
    except OSError as error:  # of standard output or error; others have been told
        _give_up_streams()
        if isinstance(error, BrokenPipeError):
            return UNREAD
        print(f"smallvit: standard output: {error.strerror}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    """Run a verb, and say in one line what goes wrong."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"smallvit {__version__}")
        return 0
    rank = int(os.environ.get("RANK", "0"))
    speaker = f"smallvit: process {rank}:" if rank else "smallvit:"
    try:
        if argv[0] not in VERBS:
            raise InputError(f"unknown verb {argv[0]!r}{nearest(argv[0], VERBS)}; see smallvit --help")
        return import_module(f"smallvit.cli.{argv[0]}").main(argv[1:])
    except InputError as error:
        print(f"{speaker} {error}", file=sys.stderr)
        return 2
    except (DivergedError, OthersEndedError) as error:
        if not rank:  # one of torchrun's processes says it for all
            print(f"{speaker} {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except (TrainingError, OSError) as error:
        print(f"{speaker} {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "number", 2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt; while torch is imported end at once, as it may swallow the interrupt and go on with half of numpy."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        os._exit(128 + number)
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """Take Python's own way with Ctrl-C, but for imports; another program's is left alone."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_streams() -> None:
    """Have the standard streams take any text, and keep the numbers of closed ones from the files that are opened next.

    A closed standard error becomes the null device, as libraries write there unasked; the others stay None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show


def _give_up_streams() -> None:
    """Turn streams that cannot be written to the null device: Python tries to write what is in their buffers again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
