"""The command line: one thin file per verb, imported when the verb is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from smallvit import __version__
from smallvit.errors import DivergedError, InputError, OthersEndedError, TrainingError, nearest

VERBS = {
    "train": "train a model and write its run folder",
    "watch": "draw a run's curves in the terminal while it trains",
    "eval": "judge a trained model: accuracy with its interval, each class, calibration, robustness",
    "predict": "classify images: the likeliest classes and their probabilities",
    "attend": "draw where a trained model looks: attention maps, rollout, relevance, temperatures",
    "report": "write a run, or several, as one HTML page",
    "compare": "train what is missing, and set models side by side: accuracy, size, speed",
    "profile": "measure what models cost: parameters, operations, memory, latency, throughput",
    "export": "write a trained model for other programs: ONNX, torch.export, timm, the Hugging Face Hub",
    "probe": "judge a trained model's features on other data: linear classifier, nearest neighbours",
    "show": "write a picture of augmented training images, as the model sees them",
    "list": "list what has a name: architectures, recipes, data sets, plugins, augmentation presets",
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

Exit codes: 0 done, 1 failed, 2 bad input (one line says what, where and what to do), 130 interrupted, 143 terminated.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
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
    except (TrainingError, OSError) as error:
        print(f"{speaker} {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "number", 2)
