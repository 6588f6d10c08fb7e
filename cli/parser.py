"""Create command-line flags from `Config`: one per field, with the field's docstring as help.

argparse is used instead of a generator such as tyro, because bad input must end in one line that names the closest
valid flag.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from smallvit.config import recipes
from smallvit.config.config import Config, expand_options, literals, option_names
from smallvit.config.options import REGULARIZATION
from smallvit.config.other_names import suggest_option
from smallvit.datasets.catalog import DATASETS, require_data
from smallvit.models import weights_info
from smallvit.models.architectures import CIFAR_RESNETS, OURS, timm_names
from smallvit.plugins import PLUGINS
from smallvit.runs.run import Run, read_options
from smallvit.training.launch import apply_regularization
from smallvit.training.losses import LOSSES
from smallvit.utils.errors import WORDS, InputError, flag, is_utf8, require
from smallvit.utils.sizes import Rectangle

DEFAULTS_FROM = {
    "recipe": ("NAME", "Defaults of a recipe (see smallvit list recipes)."),
    "config": ("FILE", "Defaults of a run: its config.json or folder."),
}
"""Flags that replace the defaults of options: metavar and help."""


EVALUATION_HELP = {
    "arch": "Architecture of a weights file without smallvit metadata: a timm model.",
    "data": "Images instead of the run's: a dataset name, a folder, zip file or table, or hfds/NAME.",
    "img_size": "Image size in pixels, e.g. 64, or height x width, e.g. 64x96; by default the model's.",
}
"""Help of options where verbs evaluate a trained model."""
EVALUATION_OPTIONS = option_names("evaluation")
"""Options of verbs that evaluate a trained model."""


LOSS_OPTIONS = "loss_options"
"""The option of `Config` that holds the own options of losses."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that does not break names at hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, **WORDS)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with a short and a full help, flags in any position, and one-line InputErrors.

    Args:
        prog: The command.
        description: First lines of the help.
        details: More lines of the full help.

    Raises:
        InputError: an unknown flag (what was meant is named), a value of the wrong type, an argument that is missing.
    """

    def __init__(self, prog: str, description: str, details: str = "") -> None:
        formatter = partial(_HelpFormatter, max_help_position=20)
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter)
        self.details = details
        self.rest: list[argparse._ArgumentGroup] = []
        """Groups of which the short help shows the titles only."""
        self.pools_data = False
        """Whether --data may be given several times."""

    def format_help(self, *, full: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage or self._synopsis(), (), ())
        formatter.add_text(f"{self.description}{self.details if full else ''}")
        for group in self._action_groups:
            if full or group not in self.rest:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        if self.rest and not full:
            formatter.start_section("more options, shown by --help-all")
            formatter.add_arguments(argparse.Action([], group.title, help=group.description) for group in self.rest)
            formatter.end_section()
        return formatter.format_help()

    def _synopsis(self) -> str:
        """Return the verb and the positional arguments; flags are listed below."""
        forms = {"*": "[{} ...]", "+": "{} ...", "?": "[{}]"}
        bare = [action for action in self._actions if not action.option_strings]
        return " ".join(["%(prog)s", *(forms.get(each.nargs, "{}").format(each.metavar) for each in bare), "[OPTIONS]"])

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        self.usage = self._synopsis()  # now, as flags among other arguments make argparse forget these for a while
        self._args = args
        options, unknown = self.parse_known_intermixed_args(args)
        if unknown:
            raise InputError(self._explain_unknown(unknown))
        if isinstance(data := getattr(options, "data", None), list) and not self.pools_data:
            if len(data) > 1:
                raise InputError(f"--data {data[1]}: {self.prog} takes one data set, and --data {data[0]} is given")
            options.data = data[0]
        out = getattr(options, "out", None) or ""
        require(is_utf8(out), "out", ascii(out), "a name in UTF-8; choose another")  # now, not when all is computed
        return options

    def error(self, message: str) -> NoReturn:
        raise InputError(self._explain_error(message.removeprefix("argument ")))

    def _explain_unknown(self, unknown: Sequence[str]) -> str:
        """Return the message for arguments that the verb does not take, with what was meant."""
        args = self._args
        flags = {each: action for action in self._actions for each in action.option_strings}
        shown = {each.lstrip("-").replace("-", "_"): each for each in flags}
        bare = [each.metavar for each in self._actions if not each.option_strings and each.nargs != "*"]
        shown |= {str(name): str(name) for name in bare}
        text = next((each for each in unknown if each.startswith("-")), unknown[0])
        if text.startswith("-"):
            text = text.partition("=")[0]
            return f"{text}: no such option{suggest_option(text, shown) or f'; see {self.prog} --help'}"
        index = args.index(text)
        if (guess := _guess_flag(text)) in flags:
            command = shlex.join([*self.prog.split(), *args[:index], guess, *args[index:]])
            return f"unknown argument {text!r}; use {command}"
        if index and args[index - 1] in flags and flags[args[index - 1]].nargs == 0:
            return f"{args[index - 1]} takes no value; remove {text!r}"
        return f"unknown argument {text!r}; see {self.prog} --help"

    def _explain_error(self, message: str) -> str:
        """Return argparse's message with what was expected, and the command where RUN is missing."""
        required = "the following arguments are required: "
        if message in (f"{required}RUN", f"{required}RUN, IMAGE"):
            run = find_newest_run()
            command = shlex.join([*self.prog.split(), run or "RUN", *self._args])
            command += " IMAGE ..." * message.endswith("IMAGE")
            return f"RUN is missing; use {command}" + ("" if run else ", with the folder of a run")
        name = re.sub(r": expected (one|at least one) argument$", "", message.removeprefix(required))
        for action in self._actions:
            if name == ("/".join(action.option_strings) or action.metavar):
                value = f" {action.metavar or '{' + ','.join(action.choices or ()) + '}'}" if name[0] == "-" else ""
                about = " ".join((action.help or "").replace("%%", "%").split())
                return f"{name}{value}: the value is missing. {about}"
        if wrong := re.fullmatch(r"(\S+): invalid (int|float) value: '(.*)'", message):
            return f"{wrong[1]} {wrong[3]}: expected {'a whole number' if wrong[2] == 'int' else 'a number'}"
        return f"{message.replace('ignored explicit argument', 'takes no value; remove')}; see {self.prog} --help"


def find_newest_run() -> str | None:
    """Return the folder under runs/ with the newest weights; None without one."""
    newest = max(Path("runs").glob(f"*/{Run.BEST}"), key=os.path.getmtime, default=None)
    return None if newest is None else str(newest.parent)


def is_run(name: str) -> bool:
    """Return whether a folder holds a run or an exported model."""
    folder = Path(os.path.expanduser(name))
    return any(os.path.exists(folder / each) for each in (Run.CONFIG, Run.BEST, weights_info.EXPORTED))


def _guess_flag(text: str) -> str | None:
    """Return the flag of a value that was given without one."""
    if is_run(text):
        return "--resume" if os.path.exists(Path(os.path.expanduser(text)) / Run.CONFIG) else "--init"
    if text in DATASETS or os.path.exists(os.path.expanduser(text)):
        return "--data"
    arch = re.split(r"[+,.]", text)[0]
    return "--arch" if arch in OURS or arch in CIFAR_RESNETS or arch in timm_names() else None


def require_run(prog: str, args: Sequence[str], run: str, images: Sequence[str], *, folders: bool = False) -> None:
    """Check that RUN was not forgotten, so that the first image is taken for it.

    Args:
        prog: The program and the verb.
        args: All arguments that were given.
        run: What was given as RUN.
        images: The images after it.
        folders: Whether the verb also takes folders of images.

    Raises:
        InputError: RUN is an image, or a folder of images without further images.
    """
    from smallvit.datasets.listing import is_image

    folder = os.path.isdir(os.path.expanduser(run))
    if is_run(run) or not (folders and not images if folder else is_image(run)):
        return
    named = next(filter(is_run, images), None)
    command = [*prog.split(), named or find_newest_run() or "RUN", *(each for each in args if each != named)]
    raise InputError(f"{run}: {'a folder of images' if folder else 'an image'}, not a run; use {shlex.join(command)}")


class _FullHelp(argparse.Action):
    """Print the help with all options, and exit."""

    def __call__(self, parser: Parser, *_: object) -> NoReturn:
        print(parser.format_help(full=True), end="")
        parser.exit()


def options_parser(
    prog: str,
    description: str,
    only: Collection[str] | None = None,
    own: Callable[[Parser], None] | None = None,
    help_texts: Mapping[str, str] = MappingProxyType({}),
    details: str = "",
    shown: str = "",
) -> Parser:
    """Create a parser with a flag for every option of the configuration; --help shows the common ones.

    Args:
        only: Names of options, or groups of them (`data.*`), to include; by default all.
        own: Function that adds arguments that are not options.
        help_texts: Help of options that mean something else here.
        details: Lines that only --help-all shows.
        shown: Group of options that --help shows too.
    """
    parser = Parser(prog, description, details)
    parser.pools_data = only is None
    if own is not None:
        own(parser)
    common = parser._optionals
    common.title = "common options"
    parser._action_groups.sort(key=lambda group: group is common)  # after those of `own`
    parser.add_argument("--help-all", action=_FullHelp, nargs=0, default=argparse.SUPPRESS, help="show all and exit")
    either = common.add_mutually_exclusive_group()
    for name, (metavar, sentence) in DEFAULTS_FROM.items():
        if only is None or name in only:
            either.add_argument(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=sentence)
    for group, group_class in get_type_hints(Config).items():
        chosen = [o for o in fields(group_class) if only is None or f"{group}.*" in only or o.name in only]
        _add_options(common, group_class, [o for o in chosen if "common" in o.metadata], help_texts)
        if group == shown:
            section = parser.add_argument_group(group, group_class.__doc__)
            _add_options(section, group_class, chosen, help_texts)
        elif rest := [o for o in chosen if "common" not in o.metadata]:
            parser.rest.append(parser.add_argument_group(group, group_class.__doc__))
            _add_options(parser.rest[-1], group_class, rest, help_texts)
    return parser


def _add_options(
    section: argparse._ArgumentGroup, group_class: type, chosen: list[Field[Any]], help_texts: Mapping[str, str]
) -> None:
    sentences, kinds = field_docs(group_class), get_type_hints(group_class)
    for option in chosen:
        if option.name == LOSS_OPTIONS:
            _add_loss_options(section)
            continue
        if option.name == "more_data":  # --data, given again
            continue
        sentence = help_texts.get(option.name) or sentences[option.name]
        if option.name in ("loss", "distill"):
            losses = {name: loss for name, loss in LOSSES.items() if loss.distillation == (option.name == "distill")}
            sentence += " " + "; ".join(f"{name}: {loss.help}" for name, loss in losses.items()) + "."
        unset = option.default is None or option.default is False
        shown = "" if unset or option.name in help_texts else f" [{option.default}]"
        several = {"action": "append"} if option.name == "data" else {}
        _add_flag(section, option.name, kinds[option.name], sentence + shown, **several)


def _add_loss_options(section: argparse._ArgumentGroup) -> None:
    """Add the flags of losses with own options: --<loss>-<field>."""
    for name, loss in LOSSES.items():
        if loss.options is None:
            continue
        sentences, kinds = field_docs(loss.options), get_type_hints(loss.options)
        for option in fields(loss.options):
            help_text = f"Loss {name}: {sentences[option.name]} [{option.default}]"
            own_name = f"{name}_{option.name}"
            _add_flag(section, own_name, kinds[option.name], help_text, dest=f"{LOSS_OPTIONS}.{own_name}")


def _add_flag(section: argparse._ArgumentGroup, name: str, kind: Any, help_text: str, **more: Any) -> None:
    """Add the flag of an option with this name and type."""
    help_text = help_text.replace("%", "%%")
    section.add_argument(flag(name), default=argparse.SUPPRESS, help=help_text, **_value(kind), **more)


def parse(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """Parse arguments and return options for `Config.build`: the values of a recipe or file, and the flags.

    The values of arguments that are not options are included.

    Raises:
        InputError: an unknown flag or recipe (what was meant is named), a value of the wrong type, an unusable file.
    """
    options = expand_options(vars(parser.parse_args(argv)))
    own = {name: options.pop(name) for name in [*options] if name.startswith(f"{LOSS_OPTIONS}.")}
    if own:
        options[LOSS_OPTIONS] = {name.partition(".")[2]: value for name, value in own.items()}
    recipe, config = options.pop("recipe", None), options.pop("config", None)
    if recipe is not None:
        return recipes.apply_recipe(recipe, options)
    return options if config is None else _stored(config, options) | options


def _stored(file: str, flags: Collection[str]) -> dict[str, Any]:
    """Return the options in a configuration file, without a preset's values if a flag names another preset."""
    path = Path(os.path.expanduser(file))
    path = path / Run.CONFIG if os.path.isdir(path) else path
    stored = read_options(path)
    if "regularization" in flags or "loss" in flags:
        bare = {name: value for name, value in stored.items() if name not in REGULARIZATION["none"]}
        followed = apply_regularization(Config.from_dict(bare)).to_dict()
        return bare | {name: stored[name] for name in stored.keys() - bare if stored[name] != followed[name]}
    return stored


def evaluation_parser(
    prog: str,
    description: str,
    own: Callable[[Parser], None] = lambda _: None,
    only: Collection[str] = EVALUATION_OPTIONS,
    help_texts: Mapping[str, str] = MappingProxyType({}),
) -> Parser:
    """Create the parser of a verb that evaluates a trained model, as `options_parser` does."""

    def add_arguments(parser: Parser) -> None:
        what = "A run folder, a weights file (.safetensors), or a timm model with pretrained weights."
        parser.add_argument("name", metavar="RUN", help=what)
        own(parser)

    return options_parser(prog, description, only, add_arguments, EVALUATION_HELP | help_texts)


def evaluation_config(name: str, verb: str, options: Mapping[str, Any]) -> Config:
    """Return the configuration to evaluate a trained model with: the run's data options, replaced by those given.

    Raises:
        InputError: There is no such model or data, or an option is invalid.
    """
    config = Config.build(**weights_info.add_data_options(weights_info.read_weights_info(name, verb), options))
    require_data(config.data.data)
    return config


@cache
def field_docs(group_class: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass; those of plugins come from their configurations."""
    sentences = {}
    for base in filter(is_dataclass, group_class.__mro__):
        with contextlib.suppress(OSError):  # a generated class has no source
            definition = ast.parse(inspect.getsource(base)).body[0]
            assert isinstance(definition, ast.ClassDef)
            for pair in pairwise(definition.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        sentences[name] = " ".join(text.split())
    for option in fields(group_class):
        if (plugin := PLUGINS.get(option.metadata.get("plugin"))) is not None:
            name = option.metadata.get("field")
            described = f"{plugin.label}: {field_docs(plugin.config)[name]}" if name else plugin.config.__doc__
            sentences[option.name] = described
    return sentences


def _value(kind: Any) -> dict[str, Any]:
    """Return argparse's arguments for a field's type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        choices = "{" + ",".join(get_args(kind)) + "}"
        return {"metavar": choices if len(choices) < 50 else "NAME"}
    if Rectangle in get_args(kind):
        return {"type": str, "metavar": "SIZE"}
    if words := literals(kind):

        def parse_number(text: str) -> int | str:
            return text if text in words else int(text)

        parse_number.__name__ = "int"
        return {"type": parse_number, "metavar": "N"}
    plain = next(k for k in get_args(kind) or (kind,) if k is not NoneType)
    return {"type": plain, "metavar": {int: "N", float: "X", str: "NAME"}[plain]}
