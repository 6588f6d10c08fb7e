"""What --help says holds: its examples are understood, and no argument goes without a sentence."""

from __future__ import annotations

import shlex
from importlib import import_module
from types import ModuleType

import pytest

from smallvit.cli import VERBS
from smallvit.cli.options import parsed
from smallvit.config import Config


def module(verb: str) -> ModuleType:
    return import_module(f"smallvit.cli.{verb}")


def examples(verb: str) -> list[list[str]]:
    """The arguments of the commands that a verb's help shows."""
    lines = [line for line in module(verb).DESCRIPTION.splitlines() if line.startswith(f"  smallvit {verb}")]
    return [shlex.split(line.partition(" > ")[0], comments=True)[2:] for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_understood(verb: str) -> None:
    assert len(examples(verb)) >= 2
    for arguments in examples(verb):
        given = module(verb).parser().parse_args(arguments)
        assert not {"recipe", "config"} & vars(given).keys() or Config.build(**parsed(module(verb).parser(), arguments))


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_has_a_sentence(verb: str) -> None:
    for action in module(verb).parser()._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_first_what_the_verb_does_and_names_the_program(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module(verb).main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: smallvit {verb} ")
    first, second, *_ = module(verb).DESCRIPTION.splitlines()
    assert first.endswith(".")
    assert first in shown
    assert second == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_the_screen(verb: str) -> None:
    assert all(len(line) <= 120 for line in module(verb).DESCRIPTION.splitlines())
