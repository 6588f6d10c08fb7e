"""Test that examples in --help parse, and that every argument has a help text."""

from __future__ import annotations

import shlex
from importlib import import_module
from types import ModuleType

import pytest

from smallvit.cli import VERBS
from smallvit.cli.parser import parse
from smallvit.config.config import Config


def module(verb: str) -> ModuleType:
    return import_module(f"smallvit.cli.{verb}")


def examples(verb: str) -> list[list[str]]:
    """Return the arguments of the example commands in a verb's help."""
    lines = [line for line in module(verb).DESCRIPTION.splitlines() if line.startswith(f"  smallvit {verb}")]
    return [shlex.split(line.partition(" > ")[0], comments=True)[2:] for line in lines]


def test_examples_parse() -> None:
    for verb in VERBS:
        assert len(examples(verb)) >= 2, verb
        parser = module(verb).parser()
        for arguments in examples(verb):
            options = parser.parse_args(arguments)
            if {"recipe", "config"} & vars(options).keys():
                assert Config.build(**parse(parser, arguments))


def test_every_argument_has_a_help_text() -> None:
    missing = [(verb, action.dest) for verb in VERBS for action in module(verb).parser()._actions if not action.help]
    assert not missing


def test_help_shows_program_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            module(verb).main(["--help"])
        out = capsys.readouterr().out
        first, second, *_ = lines = module(verb).DESCRIPTION.splitlines()
        assert ended.value.code == 0, verb
        assert out.startswith(f"usage: smallvit {verb} "), verb
        assert first.endswith("."), verb
        assert first in out, verb
        assert second == "", verb
        assert all(len(line) <= 120 for line in lines), verb
