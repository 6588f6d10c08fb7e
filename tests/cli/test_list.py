"""Check the tables of `smallvit list`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import timm

from smallvit.cli.list import ARCHS, TABLES
from smallvit.config.recipes import RECIPES
from smallvit.config.spec import format_value
from smallvit.datasets import DATASETS
from smallvit.datasets.presets import PRESETS
from smallvit.models.architectures import CIFAR_RESNETS, OURS
from smallvit.plugins import PLUGINS, LSAConfig, SPTConfig

LABELS = ", ".join(plugin.label for plugin in PLUGINS.values())
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by the first cell."""
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells[1:]}


@pytest.mark.slow
def test_archs_lists_all_of_ours_with_the_published_parameters(smallvit: Command) -> None:
    code, out, _ = smallvit("list", "archs")
    cells = rows(out)
    assert code == 0
    assert set(cells) == {*OURS, *CIFAR_RESNETS} == set(ARCHS)
    assert cells["vit"] == ["32", "2,692,426", f"{LABELS}, token", "no"]  # the official code's
    assert cells["swin"] == ["32", "7,073,188", LABELS, "no"]
    assert cells["resnet56"] == ["32", "853,018", "", "no"]
    assert all(f"{name}: {what}" in out for name, what in ARCHS.items())
    assert f"of timm {timm.__version__}" in out


def test_a_pattern_lists_timm_models(smallvit: Command) -> None:
    _, out, _ = smallvit("list", "archs", "deit_t*")
    cells = rows(out)
    assert set(cells) == set(timm.list_models("deit_t*"))
    size = sum(weight.numel() for weight in timm.create_model("deit_tiny_patch16_224").parameters())
    assert cells["deit_tiny_patch16_224"] == ["224", f"{size:,}", f"{LABELS}, token", "yes"]


@pytest.mark.slow
def test_names_are_whole_at_any_width(smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = "swinv2_cr_tiny_ns*"
    for columns in ("30", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        for words, names in {("architectures",): ARCHS, ("models", theirs): timm.list_models(theirs)}.items():
            code, out, _ = smallvit("list", *words)
            assert (code, "…" in out) == (0, False)
            assert rows(out).keys() - {""} == set(names)
        code, out, _ = smallvit("list", "datasets")
        assert ("…" in out, rows(out).keys() - {""}) == (False, set(DATASETS))


def test_a_pattern_may_match_ours_and_timms(smallvit: Command) -> None:
    cells = rows(smallvit("list", "archs", "resnet1[18]*")[1])
    assert {"resnet110", "resnet18"} <= set(cells)
    assert cells["resnet18"][2] == ""


def test_plugins_lists_every_option_with_its_default(smallvit: Command) -> None:
    code, out, _ = smallvit("list", "plugins")
    cells = rows(out)
    assert code == 0
    for plugin, config in (("spt", SPTConfig), ("lsa", LSAConfig)):
        for variant in fields(config):
            assert cells[f"--{plugin}-{variant.name}"][0] == format_value(variant.default)
    assert "--dist-token" in cells
    assert out.count("arXiv:2112.13492") == 2
    assert "arXiv:2012.12877" in out


@pytest.mark.parametrize(("what", "names"), [("data", DATASETS), ("aug", PRESETS), ("recipes", RECIPES)])
def test_tables_list_everything_or_what_matches(smallvit: Command, what: str, names: dict[str, object]) -> None:
    assert list(rows(smallvit("list", what)[1])) == list(names)
    first = next(iter(names))
    assert list(rows(smallvit("list", what, first)[1])) == [first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dta"], "expected one of archs, recipes, experiments, data, plugins, aug (did you mean 'data'?)"),
        (["archs", "vti"], "no name matches 'vti' (did you mean 'vit'?)"),
        (["archs", "deti_tiny_patch16_224"], "(did you mean 'deit_tiny_patch16_224'?)"),
        (["recipes", "x"], "no name matches 'x'"),
        (["archs", "vit", "cait"], "unknown argument 'cait'"),
        ([], "WHAT"),
    ],
)
def test_bad_arguments_end_in_one_line(smallvit: Command, arguments: list[str], message: str) -> None:
    code, out, err = smallvit("list", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_help_names_every_table(smallvit: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smallvit("list", "--help")
    shown = capsys.readouterr().out
    assert all(f"smallvit list {what}" in shown for what in TABLES)
