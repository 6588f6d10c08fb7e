"""Regularisation presets: their published numbers, and what given options do to them."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from smallvit.config import Config
from smallvit.options import OptimConfig
from smallvit.regularise import PRESETS, regularised

NAMES = ("dropout", "drop_path", "weight_decay", "smoothing")
PUBLISHED = {  # dropout, stochastic depth, weight decay, label smoothing
    "none": (0.0, 0.0, 0.0, 0.0),
    "paper": (0.0, 0.1, 0.05, 0.1),  # arXiv:2112.13492, its code
    "deit": (0.0, 0.1, 0.05, 0.1),  # arXiv:2012.12877, table 9
    "deit3": (0.0, 0.05, 0.05, 0.0),  # arXiv:2204.07118, ViT-S
    "augreg-none-0.03": (0.0, 0.0, 0.03, 0.0),  # arXiv:2106.10270, section 3.3
    "augreg-none-0.1": (0.0, 0.0, 0.1, 0.0),
    "augreg-0.03": (0.1, 0.1, 0.03, 0.0),
    "augreg-0.1": (0.1, 0.1, 0.1, 0.0),
}


def values(**options: Any) -> tuple[float | None, ...]:
    found = regularised(Config.build(**options)).options()
    return tuple(found[name] for name in NAMES)


@pytest.mark.parametrize("reg", PUBLISHED)
def test_presets_have_the_published_numbers(reg: str) -> None:
    assert values(reg=reg) == PUBLISHED[reg]


def test_every_preset_can_be_asked_for_and_sets_all_four() -> None:
    assert set(get_args(get_type_hints(OptimConfig)["reg"])) == {"auto", *PRESETS} == {"auto", *PUBLISHED}
    assert all(set(preset) == set(NAMES) for preset in PRESETS.values())


def test_auto_leaves_dropout_and_stochastic_depth_to_the_architecture() -> None:
    assert values() == values(reg="auto") == (None, None, 0.05, 0.1)


@pytest.mark.parametrize("reg", ["auto", *PUBLISHED])
@pytest.mark.parametrize("given", [0.0, 0.37])
@pytest.mark.parametrize("name", NAMES)
def test_given_options_win_over_the_preset(name: str, given: float, reg: str) -> None:
    expected = list(values(reg=reg))
    expected[NAMES.index(name)] = given
    assert values(reg=reg, **{name: given}) == tuple(expected)


@pytest.mark.parametrize("reg", ["auto", *PUBLISHED])
def test_nothing_else_changes_and_a_second_time_changes_nothing(reg: str) -> None:
    config = Config.build(reg=reg, arch="cait", epochs=7, seed=3, aug="deit")
    once = regularised(config)
    assert regularised(once) == once
    before, after = config.options(), once.options()
    assert {name for name in before if before[name] != after[name]} <= set(NAMES)
    assert all(before[name] is None for name in NAMES)
