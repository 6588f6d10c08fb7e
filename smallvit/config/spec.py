"""Parse rows of comparisons and profiles: a model with plugins, and its options. Imports no torch.

ARCH[+PLUGIN]...[,option=value]...    such as vit+spt+lsa,lr=0.003 or resnet56,recipe=resnet
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from smallvit.config import recipes
from smallvit.config.config import Config, option_names, option_types
from smallvit.config.model import BINARYVIT_PARTS, is_binaryvit, split_arch
from smallvit.config.other_names import suggest_option
from smallvit.plugins import PLUGINS
from smallvit.utils import files
from smallvit.utils.errors import InputError, flag

SPEC_FORM = "ARCH[+PLUGIN]...[,option=value]..."
STARRED = {"binary_downsampling": False}
"""BinaryViT with downsampling in full precision, marked by a star in its paper."""
FULL_PRECISION = {"binary_weights": False, "binary_activations": False, "binary_attention": False}
"""BinaryViT in full precision."""
LEE2021_ABLATION = ((), ("spt",), ("lsa",), ("spt", "lsa"))
"""Sets of plugins in the ablation of Lee et al. 2021, arXiv:2112.13492."""
WORDS = {"true": True, "false": False}
LONGEST = 100
"""Maximum length of a label in a folder name."""


@dataclass(frozen=True)
class RowSpec:
    """A model and its own options."""

    arch: str
    options: dict[str, Any]
    """Options of `Config` by name; plugins only if they are on."""
    recipe: str | None = None

    @property
    def label(self) -> str:
        """Canonical text of the row, with options sorted by name."""
        return format_label(self.arch, self.options | ({"recipe": self.recipe} if self.recipe else {}))

    def folder(self, seed: int) -> str:
        """Return the folder name of one of its runs, unique to the row."""
        return run_folder_name(self.label, seed)

    def given(self, flags: dict[str, Any], recipe: str | None) -> dict[str, Any]:
        """Return the options of `Config`: the row's own, else the comparison's flags, else the recipe's."""
        paths = {
            name: files.absolute_name(self.options[name])
            for name in option_names("path")
            if name != "data" and self.options.get(name)
        }
        options = flags | self.options | paths | {"arch": self.arch}
        if (name := self.recipe or recipe) is not None:
            options = recipes.apply_recipe(name, options)
        return {name: value for name, value in options.items() if name not in PLUGINS or name in self.options}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the row in input errors."""
        try:
            yield
        except InputError as error:
            raise InputError(f"row {self.label}: {error}") from None


def parse_spec(text: str) -> RowSpec:
    """Parse a row.

    Raises:
        InputError: it is not of the form, or has an option that is unknown, of the wrong type, or not a row's to set.
    """
    model, *settings = (part.strip() for part in text.split(","))
    arch, plugins = split_arch(model)
    if not arch:
        raise InputError(f"row {text!r}: expected {SPEC_FORM}")
    options: dict[str, Any] = dict.fromkeys(plugins, True)
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
    row = RowSpec(arch, {name: value for name, value in options.items() if name not in PLUGINS or value}, recipe)
    with row.named():
        Config.build(**row.given({}, None))
    return row


def expand_ablation(row: RowSpec) -> list[RowSpec]:
    """Return the row with each set of `LEE2021_ABLATION`; for BinaryViT, its steps from a binary DeiT.

    Raises:
        InputError: it has plugins or options that the ablation sets.
    """
    if is_binaryvit(row.arch):
        return _binary_ablation(row)
    if any(plugin in row.options for plugin in PLUGINS):
        raise InputError(f"row {row.label}: --ablation adds the plugins itself; give {row.arch} without them")
    return [replace(row, options=dict.fromkeys(plugins, True) | row.options) for plugins in LEE2021_ABLATION]


def _binary_ablation(row: RowSpec) -> list[RowSpec]:
    if set_already := row.options.keys() & {*BINARYVIT_PARTS, *FULL_PRECISION}:
        raise InputError(f"row {row.label}: --ablation sets {flag(min(set_already))} itself; remove it")
    steps = [dict.fromkeys(BINARYVIT_PARTS[count:], False) for count in range(len(BINARYVIT_PARTS) + 1)]
    return [replace(row, options=row.options | step) for step in (*steps, STARRED, FULL_PRECISION)]


def format_label(arch: str, options: dict[str, Any]) -> str:
    """Return the canonical text of a row."""
    plugins = [f"+{plugin}" for plugin in PLUGINS if options.get(plugin)]
    rest = sorted(name for name in options if name not in PLUGINS)
    return "".join([arch, *plugins, *(f",{name.replace('_', '-')}={format_value(options[name])}" for name in rest)])


def run_folder_name(label: str, seed: int) -> str:
    """Return the folder name of a run, unique to its label."""
    safe = re.sub(r"[^A-Za-z0-9._+=,-]", "-", label)[:LONGEST]
    name = safe if safe == label else f"{safe}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return f"{name}-seed{seed}"


def format_value(value: Any) -> str:
    """Return the text of an option's value in a row."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def require_shared_option(name: str) -> None:
    """Check that an option can be shared by all rows.

    Raises:
        InputError: it cannot; the line says where to set it.
    """
    if name not in option_names("shared"):
        if option_types()[name][0] == "run" or name in ("fsdp", "sync_bn"):
            raise InputError(f"{flag(name)} has no effect in a comparison; remove it")
        row = f"vit+{name}" if name in PLUGINS else f"vit,{name.replace('_', '-')}=..."
        raise InputError(f"{flag(name)} differs between models: set it for a row (--arch {row}), or by --recipe")


def _value(row: str, name: str, text: str) -> Any:
    """Parse the value of an option."""
    types = option_types()
    if name not in types or name == "arch":
        hint = suggest_option(name, {each: each for each in (*types, "recipe") if each != "arch"})
        raise InputError(f"row {row}: no such option as {name!r}{hint}")
    group, kind = types[name]
    if name == "epochs":
        raise InputError(f"row {row}: a comparison has one budget; give --epochs or --images-seen, for all rows")
    if name in ("device", "fsdp", "sync_bn", "test_flip") or group == "run" or (group == "data" and name != "balanced"):
        once = f"give {flag(name)} once, for all rows" if name in option_names("shared") else "remove it"
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
