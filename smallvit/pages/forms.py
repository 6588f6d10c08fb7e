"""What the files that a page is made of must hold: the one place where their shapes and types are checked.

A form is a function that says yes or no to a value, a list of one form, a dict of forms by key (`str` stands for any
key), or a tuple: of a form and None, which may be, and ..., if the key itself may be missing.
"""

from __future__ import annotations

from typing import Any

from smallvit.judgement import chance

LARGEST = 1e30
"""No figure of a run is beyond."""


def real(value: Any) -> bool:
    """A number, finite or not: what diverges is recorded too."""
    return type(value) in (int, float)


def finite(value: Any) -> bool:
    """A number that can be computed with."""
    return real(value) and abs(value) < LARGEST


def count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and 0 <= value < LARGEST


def some(value: Any) -> bool:
    """A whole number from 1 on."""
    return count(value) and value > 0


def text(value: Any) -> bool:
    """Letters."""
    return type(value) is str


def truth(value: Any) -> bool:
    """Yes or no."""
    return type(value) is bool


def method(value: Any) -> bool:
    """How an interval was found."""
    return text(value) and value in chance.METHODS


LINE = {
    "epoch": count,
    "val_top1": (finite, None),
    "val_loss": (real, None),
    "temperatures": ({str: [real]}, None, ...),
}
"""Of metrics.jsonl; that the other figures are numbers is checked where it is read."""
SUMMARY = {
    **dict.fromkeys(("test_top1", "train_seconds", "images_per_second"), finite),
    **dict.fromkeys(("parameters", "macs", "images_seen", "epochs", "peak_memory_bytes"), count),
    **dict.fromkeys(("hardware", "precision", "compile", "device"), text),
    "test_images": some,
    "best_epoch": (count, None, ...),
    "versions": ({str: text}, None, ...),
    "git_revision": (text, None, ...),
}
COMPARISON = {
    **dict.fromkeys(("top1", "other_top1", "difference", "p"), finite),
    **dict.fromkeys(("images", "only_one", "only_other"), count),
    "name": text,
    "interval": [finite],
    "interval_method": method,
}
CLASS = {"name": text, "images": count, **dict.fromkeys(("precision", "recall", "f1"), (finite, None))}
BIN = {"low": finite, "high": finite, "accuracy": (finite, None), "images": count}
METRICS = {
    **dict.fromkeys(("top1", "ece"), finite),
    **dict.fromkeys(("data", "split", "hardware", "precision"), text),
    **dict.fromkeys(("images", "img_size"), some),
    "interval": [finite],
    "top5": (finite, None, ...),
    "flip": truth,
    "left_out": (count, None, ...),
    "classes": [CLASS],
    "confusion": [[count]],
    "reliability": [BIN],
    "robustness": ({str: {str: finite}}, None, ...),
    "comparison": (COMPARISON, None, ...),
}
LAYER = dict.fromkeys(("entropy", "distance", "temperature"), ([finite], None, ...))
IMAGE = {"predicted": text, "probability": finite, "label": (text, None)}
ATTENTION = {"layers": [LAYER], "images": [IMAGE], "data": (text, None, ...), "split": (text, None, ...)}


def fits(value: Any, form: Any) -> bool:
    """Whether a value read from JSON has a form; keys that the form does not name may hold anything."""
    if isinstance(form, tuple):
        return value is None or fits(value, form[0])
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and not misfits(value, form)
    return form(value)


def misfits(record: dict[str, Any], form: dict[Any, Any]) -> list[str]:
    """The keys of a record that lack what the form says of them."""
    known = dict.fromkeys(record, form[str]) if str in form else form
    optional = {name for name, each in known.items() if isinstance(each, tuple) and ... in each}
    return [
        name for name, each in known.items() if not (fits(record[name], each) if name in record else name in optional)
    ]


def disagreement(metrics: dict[str, Any]) -> list[str]:
    """The keys of metrics.json, each of its form, whose sizes do not go together."""
    classes, bins, compared = (metrics.get(name) for name in ("classes", "reliability", "comparison"))
    levels = [list(each) for each in (metrics.get("robustness") or {}).values()]
    agrees = {
        "interval": len(metrics["interval"]) == 2,
        "confusion": [len(row) for row in metrics["confusion"]] == [len(classes)] * len(classes),
        "reliability": all(each["accuracy"] is not None for each in bins if each["images"]),
        "robustness": all(each == levels[0] and all(map(str.isdecimal, each)) for each in levels),
        "comparison": compared is None or len(compared["interval"]) == 2,
    }
    return [name for name, good in agrees.items() if not good]
