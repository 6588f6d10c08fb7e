"""Flags from the configuration: every field of the dataclass tree becomes one, its sentence the flag's help.

The standard library's argparse serves better than a generator such as tyro here: bad input must end in one line
that names the nearest valid flag, and tyro prints boxes whose only hook is private.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from smallvit import recipes
from smallvit.config import Config
from smallvit.errors import InputError, nearest
from smallvit.regularise import PRESETS, regularised
from smallvit.runs import Run, read_options

BEGINNINGS = {
    "recipe": ("NAME", "A recipe by name: paper, deit, ... (see smallvit list recipes)."),
    "config": ("FILE", "A run's config.json or its folder: do again what it did."),
}
"""Where options begin, in place of their defaults: what the flag takes, and its help."""


OF_A_MODEL = {
    "arch": "The timm model that another program's weights file holds; others say it themselves.",
    "data": "Other images than the run's: a data set by name, a folder or zip file, or a source of timm's readers.",
    "img_size": "Image height and width in pixels; by default the model's.",
}
"""Options of verbs that ask a trained model, and what they mean there."""
ASKS = (
    *("arch", "data", "data_dir", "data_url", "img_size", "streaming", "workers", "train_fraction", "val_fraction"),
    *("test_fraction", "split_seed", "skip_corrupt", "device", "amp"),
)
"""The options of such verbs."""


class Parser(argparse.ArgumentParser):
    """argparse, but texts keep their lines, flags may stand anywhere, and a bad argument is an InputError of one line.

    Raises:
        InputError: an unknown flag (the nearest is named), a value of the wrong type, an argument that is missing.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog, description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
        )

    def format_help(self) -> str:
        self.usage = self.usage or self._synopsis()
        return super().format_help()

    def _synopsis(self) -> str:
        """The verb and what stands without a flag; flags have their own lines."""
        forms = {"*": "[{} ...]", "+": "{} ...", "?": "[{}]"}
        bare = [action for action in self._actions if not action.option_strings]
        return " ".join(["%(prog)s", *(forms.get(each.nargs, "{}").format(each.metavar) for each in bare), "[OPTIONS]"])

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        self.usage = self._synopsis()  # now, as flags among other arguments make argparse forget these for a while
        options, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown[0].split("=")[0], flags)
            raise InputError(f"unknown argument {unknown[0]!r}{hint}; see {self.prog} --help")
        return options

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def parse_options(
    argv: list[str],
    prog: str,
    description: str,
    only: Collection[str] | None = None,
    own: Callable[[Parser], None] | None = None,
) -> dict[str, Any]:
    """The options that arguments give to the parser that `options_parser` makes."""
    return parsed(options_parser(prog, description, only, own), argv)


def options_parser(
    prog: str,
    description: str,
    only: Collection[str] | None = None,
    own: Callable[[Parser], None] | None = None,
    told: Mapping[str, str] = MappingProxyType({}),
) -> Parser:
    """A parser with a flag for every option of the configuration.

    `only` names those that serve, or groups of them (`data.*`); by default all do. `own` adds arguments that are no
    options, and `told` is the help of options that mean something of their own here.
    """
    parser = Parser(prog, description)
    if own is not None:
        own(parser)
    beginnings = [name for name in BEGINNINGS if only is None or name in only]
    if beginnings:
        section = parser.add_argument_group("begin", "What to begin with; flags win over its values.")
        either = section.add_mutually_exclusive_group()
    for name in beginnings:
        metavar, sentence = BEGINNINGS[name]
        either.add_argument(_flag(name), default=argparse.SUPPRESS, metavar=metavar, help=sentence)
    for group, group_class in get_type_hints(Config).items():
        chosen = [o for o in fields(group_class) if only is None or f"{group}.*" in only or o.name in only]
        if chosen:
            _add_group(parser, group, group_class, chosen, told)
    return parser


def _add_group(
    parser: Parser, group: str, group_class: type, chosen: list[Field[Any]], told: Mapping[str, str]
) -> None:
    whole = len(chosen) == len(fields(group_class))
    section = parser.add_argument_group(group, group_class.__doc__ if whole else None)
    sentences, kinds = field_sentences(group_class), get_type_hints(group_class)
    for option in chosen:
        shown = "" if option.default in (None, False) else f" [{option.default}]"
        section.add_argument(
            _flag(option.name),
            default=argparse.SUPPRESS,
            help=(told.get(option.name) or sentences[option.name] + shown).replace("%", "%%"),
            **_value(kinds[option.name]),
        )


def parsed(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """The options that arguments give, for `Config.build`: a recipe's or a file's values, and the flags.

    The values of arguments that are no options come among the others.

    Raises:
        InputError: an unknown flag or recipe (the nearest is named), a value of the wrong type, an unusable file.
    """
    return _begin(**vars(parser.parse_args(argv)))


def _begin(recipe: str | None = None, config: str | None = None, **flags: Any) -> dict[str, Any]:
    """The flags on top of what they begin with."""
    if recipe is not None:
        return recipes.chosen(recipe, flags)
    return flags if config is None else _stored(config, flags) | flags


def _stored(file: str, flags: Collection[str]) -> dict[str, Any]:
    """The options in a configuration file; without what followed from a preset there, where a flag names another."""
    path = Path(os.path.expanduser(file))
    path = path / Run.CONFIG if os.path.isdir(path) else path
    try:
        stored = read_options(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: {error.strerror if isinstance(error, OSError) else error}") from None
    if "reg" in flags or "loss" in flags:
        bare = {name: value for name, value in stored.items() if name not in PRESETS["none"]}
        followed = regularised(Config.build(**bare)).options()
        return bare | {name: stored[name] for name in stored.keys() - bare if stored[name] != followed[name]}
    return stored


def field_sentences(group_class: type) -> dict[str, str]:
    """The documentation string under each field of a dataclass."""
    body = ast.parse(inspect.getsource(group_class)).body[0].body
    return {
        line.target.id: " ".join(below.value.value.split())
        for line, below in pairwise(body)
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def new_file(name: str, suffix: str, *, overwrite: bool) -> Path:
    """Where --out says that a single file goes.

    Raises:
        InputError: it has another suffix, its folder is not there or cannot be written to, it is a folder itself, or
            it exists and is not to be replaced.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() != suffix:
        raise InputError(f"--out {path}: expected a name that ends in {suffix}")
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise InputError(f"--out {path}: a folder; choose another name")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"--out {path}: exists already; choose another name, or --overwrite")
    if not os.path.isdir(folder):
        raise InputError(f"--out {path}: no such folder as {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {path}: {folder} cannot be written to ({error.strerror}); choose another") from None
    return path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(kind: Any) -> dict[str, Any]:
    """What argparse needs to know about a field's type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"metavar": "{" + ",".join(get_args(kind)) + "}"}
    plain = next(k for k in get_args(kind) or (kind,) if k is not NoneType)
    return {"type": plain, "metavar": {int: "N", float: "X", str: "NAME"}[plain]}
