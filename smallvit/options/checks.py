"""How an option's value is checked."""

from __future__ import annotations

from smallvit.errors import InputError


def flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def require(holds: bool, option: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{flag(option)} {value}: expected {expected}")
