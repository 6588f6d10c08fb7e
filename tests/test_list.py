"""`smallvit list`: what has a name, and only what there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import timm

from smallvit.cli.list import ARCHS, TABLES
from smallvit.convnets import CIFAR_RESNETS
from smallvit.datasets import DATASETS
from smallvit.datasets.presets import PRESETS
from smallvit.models import OURS
from smallvit.plugins import LSAConfig, SPTConfig
from smallvit.recipes import RECIPES

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _in_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table's rows, by the first of them."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


def test_architectures_are_all_of_ours_with_the_published_parameters(smallvit: Command) -> None:
    code, out, _ = smallvit("list", "archs")
    found = rows(out)
    assert code == 0
    assert set(found) == {*OURS, *CIFAR_RESNETS} == set(ARCHS)
    assert found["vit"] == ["2,692,426", "2,729,878", "SPT, LSA, binary, token"]  # the official code's
    assert found["swin"] == ["7,073,188", "8,562,166", "SPT, LSA, binary"]
    assert found["resnet56"] == ["853,018", "", ""]
    assert all(f"{name}: {what}" in out for name, what in ARCHS.items())
    assert f"of timm {timm.__version__}" in out


def test_a_pattern_lists_timms_models_as_timm_builds_them(smallvit: Command) -> None:
    _, out, _ = smallvit("list", "archs", "deit_t*")
    found = rows(out)
    assert set(found) == set(timm.list_models("deit_t*"))
    size = sum(weight.numel() for weight in timm.create_model("deit_tiny_patch16_224").parameters())
    assert found["deit_tiny_patch16_224"] == ["224", f"{size:,}", "SPT, LSA, binary, token", "yes"]


def test_a_pattern_may_fit_ours_and_timms(smallvit: Command) -> None:
    found = rows(smallvit("list", "archs", "resnet1[18]*")[1])
    assert {"resnet110", "resnet18"} <= set(found)
    assert found["resnet18"][2] == ""


def test_plugins_are_shown_with_every_variant_and_its_default(smallvit: Command) -> None:
    code, out, _ = smallvit("list", "plugins")
    found = rows(out)
    assert code == 0
    for plugin, config in (("spt", SPTConfig), ("lsa", LSAConfig)):
        for variant in fields(config):
            default = {True: "on"}.get(variant.default, str(variant.default))
            assert found[f"--{plugin}-{variant.name}"][1] == default
    assert found["--plugin-init"][0] == "paper, exact"
    assert "--dist-token" in found
    assert out.count("arXiv:2112.13492") == 2
    assert "arXiv:2012.12877" in out


@pytest.mark.parametrize(("what", "names"), [("data", DATASETS), ("aug", PRESETS), ("recipes", RECIPES)])
def test_tables_name_all_there_is_or_what_fits(smallvit: Command, what: str, names: dict[str, object]) -> None:
    assert list(rows(smallvit("list", what)[1])) == list(names)
    first = next(iter(names))
    assert list(rows(smallvit("list", what, first)[1])) == [first]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dta"], "expected one of archs, recipes, experiments, data, plugins, aug (did you mean 'data'?)"),
        (["archs", "vti"], "no name fits 'vti' (did you mean 'vit'?)"),
        (["archs", "deti_tiny_patch16_224"], "(did you mean 'deit_tiny_patch16_224'?)"),
        (["recipes", "x"], "no name fits 'x'"),
        (["archs", "vit", "cait"], "unknown argument 'cait'"),
        ([], "WHAT"),
    ],
)
def test_bad_arguments_end_in_one_line(smallvit: Command, arguments: list[str], message: str) -> None:
    code, out, err = smallvit("list", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_every_table_is_named_in_the_help(smallvit: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smallvit("list", "--help")
    shown = capsys.readouterr().out
    assert all(f"smallvit list {what}" in shown for what in TABLES)
