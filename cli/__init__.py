"""Run the command line. Each verb is a module with `parser()` and `main(argv)`, imported on demand."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

from smallvit import __version__
from smallvit.utils.cores import set_openmp_defaults
from smallvit.utils.errors import DivergedError, InputError, PeerExitedError, TrainingError, print_message, suggest

VERBS = {
    "train": "train a model and write its run folder",
    "pretrain": "train features on images without labels",
    "watch": "draw a run's curves in the terminal while it trains",
    "eval": "evaluate a trained model: accuracy, calibration, robustness",
    "predict": "classify images: the most likely classes and their probabilities",
    "attend": "draw the attention of a trained model: maps, rollout, relevance",
    "report": "write one or more runs as an HTML page",
    "reproduce": "repeat a published experiment and compare with its results",
    "compare": "compare models by accuracy, size and speed, after training them",
    "crossval": "cross-validate a model: a run for each fold, means and predictions",
    "profile": "measure operations, memory, latency and throughput of models",
    "export": "write a trained model for ONNX, torch.export, timm or the Hub",
    "embed": "write features of images, and the nearest neighbors of each",
    "probe": "evaluate features on other data: linear classifier, neighbors",
    "check": "find duplicates, damaged files and wrong labels before training",
    "shard": "write resized images as a few large files, for many machines",
    "show": "draw augmented training images, as the model sees them",
    "list": "list architectures, recipes, experiments, data, plugins, presets",
    "completion": "print a script for completion of verbs and options in a shell",
}

_VERB_LINES = "\n".join(f"  {verb:10} {summary}" for verb, summary in VERBS.items())

USAGE = f"""\
usage: smallvit VERB [OPTIONS]

Vision Transformers that learn from small image sets.

{_VERB_LINES}

  smallvit train --arch vit --spt --lsa               the embedded digits
  smallvit train --arch vit --spt --lsa --data DIR    a folder of class folders
  smallvit watch runs/vit-spt-lsa-digits              live learning curves
  smallvit eval runs/vit-spt-lsa-digits               accuracy, with interval
  smallvit attend runs/vit-spt-lsa-digits             attention maps
  smallvit predict runs/vit-spt-lsa-digits DIR        classes of images
  smallvit report runs/vit-spt-lsa-digits             all results as one page
  smallvit compare --arch vit --ablation --seeds 2    plugins: none, each, both
  smallvit list archs                                 values of --arch
  smallvit VERB --help                                options and examples
  smallvit --version

Exit codes: 0 success, 1 failure, 2 invalid input (one line on standard error
says how to fix it), 130 interrupted, 141 output closed, 143 terminated.
"""
OUTPUT_CLOSED = 141
"""Exit code of a program that is killed by SIGPIPE."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code that `USAGE` lists.

    Args:
        argv: The arguments; None is the program's entry point, which uses `sys.argv` and sets up OpenMP and SIGINT.
    """
    if argv is None:
        set_openmp_defaults()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        argv = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal cannot show
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where errors can be reported
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich exits on it
            return OUTPUT_CLOSED
        raise
    except OSError as error:  # of standard output or error; `_run` reports others
        _discard_streams()
        if isinstance(error, BrokenPipeError):
            return OUTPUT_CLOSED
        print(f"smallvit: standard output: {error.strerror}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    """Run a verb, and report errors in one line."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"smallvit {__version__}")
        return 0
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"smallvit: process {rank}:" if rank else "smallvit:"
    try:
        if argv[0] not in VERBS:
            raise InputError(f"unknown verb {argv[0]!r}{suggest(argv[0], VERBS)}; see smallvit --help")
        return import_module(f"smallvit.cli.{argv[0]}").main(argv[1:])
    except InputError as error:
        print_message(f"{prefix} {error}")
        return 2
    except BrokenPipeError:
        raise
    except (TrainingError, OSError) as error:
        if not rank or not isinstance(error, DivergedError | PeerExitedError):  # torchrun's first process reports
            print_message(f"{prefix} {error}")
        return 1
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "number", 2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or exit at once while torch is imported, which may swallow the exception."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        os._exit(128 + number)
    raise KeyboardInterrupt


def _discard_streams() -> None:
    """Redirect streams that cannot be written to the null device, since Python flushes them again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
