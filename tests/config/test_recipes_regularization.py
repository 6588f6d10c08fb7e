"""Regularization presets: their published numbers, and what given options do to them."""

from __future__ import annotations

from typing import Any

import pytest

from smallvit.config.config import Config
from smallvit.config.options import REGULARIZATION
from smallvit.training.launch import apply_regularization

NAMES = ("dropout", "drop_path", "weight_decay", "label_smoothing")
PUBLISHED = {  # dropout, stochastic depth, weight decay, label smoothing
    "none": (0.0, 0.0, 0.0, 0.0),
    "lee2021": (0.0, 0.1, 0.05, 0.1),  # arXiv:2112.13492, its code
    "deit": (0.0, 0.1, 0.05, 0.1),  # arXiv:2012.12877, table 9
    "deit3": (0.0, 0.05, 0.05, 0.0),  # arXiv:2204.07118, ViT-S
    "augreg-none-0.03": (0.0, 0.0, 0.03, 0.0),  # arXiv:2106.10270, section 3.3
    "augreg-none-0.1": (0.0, 0.0, 0.1, 0.0),
    "augreg-0.03": (0.1, 0.1, 0.03, 0.0),
    "augreg-0.1": (0.1, 0.1, 0.1, 0.0),
}


def values(**options: Any) -> tuple[float | None, ...]:
    options_by_name = apply_regularization(Config.build(**options)).to_dict()
    return tuple(options_by_name[name] for name in NAMES)


@pytest.mark.parametrize("reg", PUBLISHED)
def test_presets_have_the_published_numbers(reg: str) -> None:
    assert values(regularization=reg) == PUBLISHED[reg]


def test_every_preset_can_be_asked_for_and_sets_all_four() -> None:
    assert set(REGULARIZATION) == set(PUBLISHED)
    assert all(set(preset) == set(NAMES) for preset in REGULARIZATION.values())


def test_auto_leaves_dropout_and_stochastic_depth_to_the_architecture() -> None:
    assert values() == values(regularization="auto") == (None, None, 0.05, 0.1)


@pytest.mark.parametrize("reg", ["auto", *PUBLISHED])
@pytest.mark.parametrize("given", [0.0, 0.37])
@pytest.mark.parametrize("name", NAMES)
def test_given_options_win_over_the_preset(name: str, given: float, reg: str) -> None:
    expected = list(values(regularization=reg))
    expected[NAMES.index(name)] = given
    assert values(regularization=reg, **{name: given}) == tuple(expected)


@pytest.mark.parametrize("reg", ["auto", *PUBLISHED])
def test_nothing_else_changes_and_a_second_time_changes_nothing(reg: str) -> None:
    config = Config.build(regularization=reg, arch="cait", epochs=7, seed=3, aug="deit")
    once = apply_regularization(config)
    assert apply_regularization(once) == once
    before, after = config.to_dict(), once.to_dict()
    assert {name for name in before if before[name] != after[name]} <= set(NAMES)
    assert all(before[name] is None for name in NAMES)
