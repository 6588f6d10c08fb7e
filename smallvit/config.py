"""The configuration of a training run: one tree of frozen dataclasses, the one source of every option.

A flat set of options describes a configuration: on the command line, in `Config.build(...)`, and in a run's
`config.json`. The groups and their options are in `options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from smallvit.errors import InputError, nearest
from smallvit.options import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DistillConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    require,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a training run.

    Raises:
        InputError: a value is out of its range; the line names the option, what was expected and what came.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def build(cls, /, **options: Any) -> Config:
        """A configuration from flat options: `Config.build(arch="vit", spt=True, data="digits")`.

        Raises:
            InputError: an option is unknown, of the wrong type or out of range.
        """
        homes = option_homes()
        for name, value in options.items():
            if name not in homes:
                raise InputError(f"unknown option {name!r}{nearest(name, homes)}")
            group, kind = homes[name]
            options[name] = _checked(name, value, kind)
        given = {group: {n: v for n, v in options.items() if homes[n][0] == group} for group in option_groups()}
        return cls(**{group: group_class(**given[group]) for group, group_class in option_groups().items()})

    def options(self) -> dict[str, Any]:
        """All options, flat: what `build` takes and `config.json` holds."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def replace(self, **options: Any) -> Config:
        """The same configuration but for these options."""
        return Config.build(**(self.options() | options))


@cache
def option_groups() -> Mapping[str, type]:
    """The class of every group, by name."""
    return MappingProxyType(get_type_hints(Config))


@cache
def option_homes() -> Mapping[str, tuple[str, Any]]:
    """The group and the type of every option, by name."""
    kinds = {group: get_type_hints(group_class) for group, group_class in option_groups().items()}
    return MappingProxyType({name: (group, kind) for group, each in kinds.items() for name, kind in each.items()})


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value if it is of the option's type (an int passes for a float), else an InputError."""
    choices = [c for c in get_args(kind) if not isinstance(c, type)]
    if choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        require(value in choices, name, value, f"one of {', '.join(choices)}{hint}")
        return value
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    require(type(value) in kinds, name, repr(value), expected)
    return value
