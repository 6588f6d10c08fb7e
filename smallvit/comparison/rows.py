"""Rows of a comparison, as `smallvit compare --arch ROW` takes them: a model, and how it is trained. Needs no torch.

ARCH[+spt][+lsa][+binary][,option=value]...    such as vit+spt+lsa,lr=0.003 or resnet56,recipe=resnet
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from smallvit import recipes, trained
from smallvit.config import Config, option_homes
from smallvit.errors import InputError, nearest
from smallvit.options import BINARYVIT_PARTS, PLUGINS, flag, is_binaryvit

FORM = "ARCH[+spt][+lsa][+binary][,option=value]..."
COMMON = (
    *("data.*", "augment.*", "epochs", "batch_size"),
    *("device", "amp", "compile", "seed", "out", "checkpoint_minutes", "log"),
)
"""Options, and groups of them, that mean the same for every row: flags of the whole comparison."""
STARRED = {"binary_downsampling": False}
"""BinaryViT with mergings in full precision, which its paper marks by a star."""
FULL_PRECISION = {"binary_weights": False, "binary_activations": False, "binary_attention": False}
"""BinaryViT without bits."""
WEIGHTS = ("init", "teacher")
"""Options that may be paths."""
WORDS = {"true": True, "false": False}
LONGEST = 100
"""Characters of a folder's name that tell the row."""


@dataclass(frozen=True)
class Row:
    """A model and the options that were given for it alone."""

    arch: str
    options: dict[str, Any]
    """Of `Config`, by name; plugins only where they are on."""
    recipe: str | None = None

    @property
    def label(self) -> str:
        """The row in its one spelling: options by their names' order."""
        return label(self.arch, self.options | ({"recipe": self.recipe} if self.recipe else {}))

    def folder(self, seed: int) -> str:
        """Name of the folder of one of its runs; another row has another."""
        return folder(self.label, seed)

    def given(self, flags: dict[str, Any], recipe: str | None) -> dict[str, Any]:
        """What `Config.build` takes: the row's own options, else the comparison's flags, else the recipe's values."""
        paths = {name: trained.absolute(self.options[name]) for name in WEIGHTS if self.options.get(name)}
        options = flags | self.options | paths | {"arch": self.arch}
        if (name := self.recipe or recipe) is not None:
            options = recipes.chosen(name, options)
        return {name: value for name, value in options.items() if name not in PLUGINS or name in self.options}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Say of bad input which row it is in."""
        try:
            yield
        except InputError as error:
            raise InputError(f"row {self.label}: {error}") from None


def parse(text: str) -> Row:
    """A row from its text.

    Raises:
        InputError: it is not of the form, or has an option that is unknown, of the wrong type, or not a row's to set.
    """
    model, *settings = (part.strip() for part in text.split(","))
    arch, *plugins = model.split("+")
    if not arch:
        raise InputError(f"row {text!r}: expected {FORM}")
    options: dict[str, Any] = {}
    for plugin in plugins:
        if plugin not in PLUGINS:
            raise InputError(f"row {text}: no such plugin as {plugin!r}{nearest(plugin, PLUGINS)}; expected {FORM}")
        options[plugin] = True
    recipe = None
    for setting in settings:
        name, _, value = (part.strip() for part in setting.partition("="))
        name = name.replace("-", "_")
        if not value:
            raise InputError(f"row {text}: {setting!r} is not of the form option=value")
        if name in options or (name == "recipe" and recipe):
            raise InputError(f"row {text}: {name} is there twice")
        if name == "recipe":
            recipe = value
        else:
            options[name] = _value(text, name, value)
    row = Row(arch, {name: value for name, value in options.items() if name not in PLUGINS or value}, recipe)
    with row.named():
        Config.build(**row.given({}, None))
    return row


def ablation(row: Row) -> list[Row]:
    """The row, then with SPT, with LSA, and with both; BinaryViT from the binary DeiT up, and in full precision.

    Raises:
        InputError: it has plugins already, or what the ablation is about.
    """
    if is_binaryvit(row.arch):
        return _binary_ablation(row)
    if any(plugin in row.options for plugin in PLUGINS):
        raise InputError(f"row {row.label}: --ablation adds the plugins itself; give {row.arch} without them")
    sets = ({}, {"spt": True}, {"lsa": True}, {"spt": True, "lsa": True})
    return [replace(row, options=plugins | row.options) for plugins in sets]


def _binary_ablation(row: Row) -> list[Row]:
    if set_already := row.options.keys() & {*BINARYVIT_PARTS, *FULL_PRECISION}:
        raise InputError(f"row {row.label}: --ablation sets {flag(min(set_already))} itself; leave it out")
    steps = [dict.fromkeys(BINARYVIT_PARTS[count:], False) for count in range(len(BINARYVIT_PARTS) + 1)]
    return [replace(row, options=row.options | step) for step in (*steps, STARRED, FULL_PRECISION)]


def label(arch: str, options: dict[str, Any]) -> str:
    """A row's spelling, of values that make it up."""
    plugins = [f"+{plugin}" for plugin in PLUGINS if options.get(plugin)]
    rest = sorted(name for name in options if name not in PLUGINS)
    return "".join([arch, *plugins, *(f",{name.replace('_', '-')}={spelt(options[name])}" for name in rest)])


def folder(label: str, seed: int) -> str:
    """Name of the folder of a run that is called `label`; another label has another."""
    safe = re.sub(r"[^A-Za-z0-9._+=,-]", "-", label)[:LONGEST]
    told = safe if safe == label else f"{safe}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return f"{told}-seed{seed}"


def spelt(value: Any) -> str:
    """An option's value as a row has it."""
    words = {word: text for text, word in WORDS.items()} | {None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def require_common(name: str) -> None:
    """Check that an option means the same for every row.

    Raises:
        InputError: it does not; the line says where it belongs.
    """
    if not _is_common(name):
        if option_homes()[name][0] == "run" or name in ("fsdp", "sync_bn"):
            raise InputError(f"{flag(name)} is of no use in a comparison; leave it out")
        row = f"vit+{name}" if name in PLUGINS else f"vit,{name.replace('_', '-')}=..."
        raise InputError(
            f"{flag(name)} means different things to different models: set it for a row (--arch {row}), or by --recipe"
        )


def _is_common(name: str) -> bool:
    return name in COMMON or f"{option_homes()[name][0]}.*" in COMMON


def _value(row: str, name: str, text: str) -> Any:
    """An option's value from its text."""
    homes = option_homes()
    if name not in homes or name == "arch":
        raise InputError(f"row {row}: no such option as {name!r}{nearest(name, [*homes, 'recipe'])}")
    group, kind = homes[name]
    if name == "epochs":
        raise InputError(f"row {row}: a comparison has one budget; give --epochs or --images-seen, for all rows")
    if name in ("device", "fsdp", "sync_bn", "test_flip") or group == "run" or (group == "data" and name != "balanced"):
        once = f"give {flag(name)} once, for all rows" if _is_common(name) else "leave it out"
        raise InputError(f"row {row}: {name} cannot differ from row to row, which share data, test and machine; {once}")
    return _converted(row, name, text, kind)


def _converted(row: str, name: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return text
    kinds = get_args(kind) or (kind,)
    plain = next(each for each in kinds if each is not NoneType)
    if plain is not str and text == "none" and NoneType in kinds:
        return None
    try:
        return WORDS[text.lower()] if plain is bool else plain(text)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[plain]
        raise InputError(f"row {row}: {name}={text}: expected {expected}") from None
