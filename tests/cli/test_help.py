"""Test that examples in --help parse, and that every argument has a help text."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from types import ModuleType

import pytest

from smallvit.cli import VERBS
from smallvit.cli.parser import parse
from smallvit.config.config import Config, option_groups
from smallvit.utils.errors import flag

Command = Callable[..., tuple[int, str, str]]


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
        first, *_ = module(verb).DESCRIPTION.split("\n\n")
        assert ended.value.code == 0, verb
        assert out.startswith(f"usage: smallvit {verb} "), verb
        assert first.endswith("."), verb
        assert first in out, verb


def show_help(smallvit: Command, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        smallvit(*arguments)
    return capsys.readouterr().out


def test_every_help_fits_80_columns(
    smallvit: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    pages = {"": smallvit("--help")[1]}
    pages |= {verb: show_help(smallvit, capsys, verb, "--help") for verb in VERBS}
    pages |= {
        f"{verb} all": show_help(smallvit, capsys, verb, "--help-all") for verb in ("train", "compare", "profile")
    }
    for name, page in pages.items():
        assert max(map(len, page.splitlines())) <= 80, name
        assert not [line for line in page.splitlines() if line.endswith("-")], name  # no name is broken at a hyphen
    assert len(pages["train"].splitlines()) <= 65


def test_help_shows_common_options_and_headings_and_help_all_every_option_once(
    smallvit: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    short, full = (show_help(smallvit, capsys, "train", which) for which in ("--help", "--help-all"))
    counts = {page: Counter(re.findall(r"^  (--[a-z0-9-]+)", page, re.MULTILINE)) for page in (short, full)}
    for group, group_class in option_groups().items():
        for each in fields(group_class):
            if each.name in ("loss_options", "more_data"):
                continue
            assert counts[full][flag(each.name)] == 1, each.name
            assert counts[short][flag(each.name)] == bool(each.metadata.get("common")), each.name
        assert f"\n  {group} " in short
        assert f"\n{group}:\n" in full
    assert 20 <= sum(counts[short].values()) <= 25
