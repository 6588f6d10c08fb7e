"""Define `Config`, all options of a training run as one tree of frozen dataclasses.

A flat set of options describes a configuration: on the command line, in `Config.build(...)`, and in a run's
`config.json`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smallvit.config.model import InitConfig, ModelConfig, expand_arch
from smallvit.config.options import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DistillConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from smallvit.utils.errors import InputError, flag, is_utf8, require, suggest
from smallvit.utils.sizes import Rectangle, parse_size


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a training run.

    Raises:
        InputError: A value is out of range; the line names the option, what was expected and what came.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        corrections = {
            "--balanced": self.data.balanced,
            "--class-weights balanced": self.optim.class_weights == "balanced",
            "--logit-adjustment": self.optim.logit_adjustment > 0,
        }
        if len(used := [name for name, on in corrections.items() if on]) > 1:
            raise InputError(f"{used[0]} and {used[1]} correct the class frequencies twice; give one of them")
        if self.pretrain.more_data and self.pretrain.labels and self.run.resume is None:
            raise InputError(
                f"--data {self.pretrain.more_data[0]}: training with labels takes one data set, and --data "
                f"{self.data.data} is given; remove one (smallvit pretrain takes several)"
            )

    @classmethod
    def build(cls, /, **options: Any) -> Config:
        """Create a configuration from flat options: `Config.build(arch="vit", spt=True, data="digits")`.

        These options count as given: an option that is given must agree with a run that is resumed.

        Raises:
            InputError: An option is unknown, of the wrong type or out of range.
        """
        return cls.from_dict(options)._with_given(expand_options(options))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Config:
        """Create a configuration from flat options, such as the contents of a run's config.json.

        Raises:
            InputError: An option is unknown, of the wrong type or out of range.
        """
        types, groups = option_types(), {group: {} for group in option_groups()}
        options = expand_options(options)
        for name, value in options.items():
            if name not in types:
                from smallvit.config.other_names import suggest_option  # for this message only

                raise InputError(f"unknown option {name!r}{suggest_option(name, {each: each for each in types})}")
            group, kind = types[name]
            groups[group][name] = _checked(name, value, kind)
        return cls(**{group: option_groups()[group](**values) for group, values in groups.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return all options, flat, as `from_dict` takes them and config.json holds them."""
        options = {name: value for group in asdict(self).values() for name, value in group.items()}
        return options | {"more_data": [*self.pretrain.more_data]}

    def replace(self, **options: Any) -> Config:
        """Return a copy with other values of these options."""
        before = self.to_dict()
        changed = [name for name, value in options.items() if name not in before or before[name] != value]
        return Config.from_dict(before | options)._with_given((*self.given, *changed))

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that were given explicitly; if unknown, of those that differ from the defaults."""
        if "_given" in self.__dict__:
            return self.__dict__["_given"]
        defaults = default_options()
        return tuple(name for name, value in self.to_dict().items() if value != defaults[name])

    def _with_given(self, names: Collection[str]) -> Config:
        self.__dict__["_given"] = tuple(dict.fromkeys(names))
        return self


def expand_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat options in which `arch` has no plugins and `data` is one data set; these are separate options.

    Raises:
        InputError: No such plugin, or the list is empty.
    """
    options = expand_arch(options)
    if isinstance(data := options.get("data"), list | tuple):
        require(len(data) > 0, "data", data, "a data set or folder")
        options |= {"data": data[0], "more_data": tuple(data[1:])}
    return options


@cache
def option_groups() -> Mapping[str, type]:
    """Return the class of every group of options, by name."""
    return MappingProxyType(get_type_hints(Config))


@cache
def option_types() -> Mapping[str, tuple[str, Any]]:
    """Return group and type of every option, by name."""
    kinds = {group: get_type_hints(group_class) for group, group_class in option_groups().items()}
    return MappingProxyType({name: (group, kind) for group, each in kinds.items() for name, kind in each.items()})


@cache
def default_options() -> Mapping[str, Any]:
    """Return the default of every option, by name."""
    return MappingProxyType(Config().to_dict())


@cache
def option_names(*tags: str) -> tuple[str, ...]:
    """Return the options that have one of these tags (`options.TAGS`)."""
    each = (each for group_class in option_groups().values() for each in fields(group_class))
    return tuple(option.name for option in each if option.metadata.keys() & {*tags})


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Check the type of an option's value, and return it (an int becomes a float)."""
    value = _to_plain(value)
    if isinstance(value, str):
        require(is_utf8(value), name, ascii(value), "a name in UTF-8; rename it")
    if get_origin(kind) is Mapping:
        require(isinstance(value, Mapping), name, repr(value), "a dictionary")
        return {str(each): _to_plain(own) for each, own in value.items()}
    if get_origin(kind) is tuple:
        require(isinstance(value, list | tuple), name, repr(value), "a list")
        return tuple(_checked(name, each, str) for each in value)
    if Rectangle in get_args(kind):
        return value if value is None else parse_size(value)
    if words := literals(kind):
        if value in words:
            return value
        kind = int
    choices = [c for c in get_args(kind) if not isinstance(c, type)]
    if choices:
        hint = suggest(value, choices) if isinstance(value, str) else ""
        require(value in choices, name, value, f"one of {', '.join(choices)}{hint}")
        return value
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    require(type(value) in kinds, name, repr(value), expected)
    return value


def literals(kind: Any) -> tuple[str, ...]:
    """Return the words that an option takes instead of a number."""
    return tuple(word for each in get_args(kind) if get_origin(each) is Literal for word in get_args(each))


def _to_plain(value: Any) -> Any:
    """Return a path as text, and a NumPy scalar or a tensor with one value as Python's own type."""
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def format_train_command(
    config: Config, without: Collection[str], *, full: bool = False, keep_folders: bool = True
) -> str:
    """Return the command that trains with these options.

    Args:
        without: Options to omit.
        full: Include all options, not only those that differ from the defaults.
        keep_folders: Keep the folders of paths, which other machines do not have.
    """
    defaults, words = default_options(), ["smallvit", "train"]
    options = config.to_dict()
    options |= options.pop("loss_options")
    more = options.pop("more_data")
    for name, value in options.items():
        several = more if name == "data" else []
        if name in without or value is None or not (full or several or value != defaults.get(name)):
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
            continue
        for each in (value, *several):
            text = str(each) if keep_folders else strip_folder(each)
            words += [f"{flag(name)}={text}"] if text.startswith("-") else [flag(name), text]
    return shlex.join(words)


def strip_folder(value: object) -> str:
    """Return a value as text, an absolute path without its folder."""
    return os.path.basename(str(value)) if os.path.isabs(str(value)) else str(value)
