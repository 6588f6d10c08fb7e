"""Policies against torchvision's and timm's tables."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, _RAND_TRANSFORMS, LEVEL_TO_ARG
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, TrivialAugmentWide

from smallvit.datasets.auto_augment import Step, create_policy, jitter_colors
from smallvit.datasets.functional import BLENDS, GEOMETRY, TABLES
from smallvit.utils.errors import InputError
from tests.sweep import sweep

SIZE = 32
KINDS = ("cifar10", "svhn", "imagenet")
ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
FIVE_SIGMA = 5.0


def draw(spec: str, b: int, size: int = SIZE, own: str = "cifar10", seed: int = 0) -> list[Step]:
    drawn = create_policy(spec, own)
    assert drawn is not None
    return drawn(np.random.default_rng(seed), b, size)


def assert_frequencies(counts: Counter, expected: dict, n: int) -> None:
    """Check that each count is within five standard deviations of its expectation, and that nothing else occurs."""
    assert set(counts) <= {key for key, p in expected.items() if p > 0}
    for key, p in expected.items():
        assert abs(counts[key] - n * p) <= FIVE_SIGMA * math.sqrt(n * p * (1 - p)) + 1e-9, key


def space(kind: str, size: int = SIZE) -> dict[str, tuple[list[float], bool]]:
    """Torchvision's magnitudes by name: a list per level, and whether either sign may come."""
    made = AutoAugment(AutoAugmentPolicy(kind))._augmentation_space(10, (size, size))
    return {name: (levels.double().flatten().tolist(), signed) for name, (levels, signed) in made.items()}


def neighbors(name: str, magnitude: float, signed: bool) -> set[float]:
    """Return the strengths that a magnitude stands for: torchvision adds 1 to those of the enhancing operations."""
    return {round((name in ENHANCE) + sign * magnitude, 5) for sign in ((1, -1) if signed else (1,))}


@sweep("kind", KINDS)
def test_autoaugment_draws_torchvisions_pairs_with_their_probabilities(kind: str) -> None:
    n = 100_000
    first, second = draw(f"autoaugment-{kind}", n)
    pairs = AutoAugment(AutoAugmentPolicy(kind)).policies
    expected: Counter = Counter()
    for (one, p, _), (two, q, _) in pairs:
        for a, chance_a in ((one, p), ("Identity", 1 - p)):
            for b, chance_b in ((two, q), ("Identity", 1 - q)):
                expected[a, b] += chance_a * chance_b / len(pairs)
    assert sum(expected.values()) == pytest.approx(1)
    drawn = Counter(zip(first.names.tolist(), second.names.tolist(), strict=True))
    assert_frequencies(drawn, {key: p for key, p in expected.items() if p > 1e-12}, n)


@sweep("size", [32, 64])
@sweep("kind", KINDS)
def test_autoaugments_strengths_are_torchvisions_at_the_levels_of_its_pairs(kind: str, size: int) -> None:
    n = 60_000
    magnitudes = space(kind, size)
    pairs = AutoAugment(AutoAugmentPolicy(kind)).policies
    for position, step in enumerate(draw(f"autoaugment-{kind}", n, size)):
        expected: Counter = Counter({("Identity", 0.0): 0.0})
        for pair in pairs:
            name, p, level = pair[position]
            levels, signed = magnitudes[name]
            strengths = neighbors(name, levels[level] if level is not None else 0.0, signed)
            for strength in strengths:
                expected[name, strength] += p / len(pairs) / len(strengths)
            expected["Identity", 0.0] += (1 - p) / len(pairs)
        drawn = Counter(zip(step.names.tolist(), (step.strengths + 0.0).round(5).tolist(), strict=True))
        assert {name for name, _ in drawn} <= {name for name, _ in expected}
        nearby = Counter()
        for (name, strength), count in drawn.items():  # translations have long fractions: the nearest, to 1e-4
            key = min((key for key in expected if key[0] == name), key=lambda key: abs(key[1] - strength))
            assert key[1] == pytest.approx(strength, abs=1e-4)
            nearby[key] += count
        assert_frequencies(nearby, expected, n)


def test_autoaugment_without_a_name_is_the_one_that_suits_the_data() -> None:
    for kind in KINDS:
        for mine, named in zip(
            draw("autoaugment", 500, own=kind), draw(f"autoaugment-{kind}", 500, own="none"), strict=True
        ):
            assert mine.names.tolist() == named.names.tolist()
            assert mine.strengths.tolist() == named.strengths.tolist()
    assert len({tuple(draw("autoaugment", 500, own=kind)[0].names.tolist()) for kind in KINDS}) == 3


def timms(name: str) -> str:
    """Timm's name without what tells its variants apart."""
    return name.removesuffix("Increasing").removesuffix("Rel")


def timms_strengths(name: str, magnitude: float, size: int) -> set[float]:
    """Return what timm's function gives at a magnitude, with either sign; translations in pixels."""
    function = LEVEL_TO_ARG[name]
    values = {function(magnitude, {})[0] for _ in range(64)} if function else {0.0}
    return {round(float(value) * (size if name.endswith("Rel") else 1), 6) for value in values}


@sweep("magnitude", [0, 2, 3.3, 5, 7, 9, 10])
def test_randaugments_strengths_are_timms(magnitude: float) -> None:
    random.seed(0)
    (step,) = draw(f"rand-m{magnitude}-n1-mstd0-inc1", 20_000)
    for name in _RAND_INCREASING_TRANSFORMS:
        drawn = np.unique((step.strengths[step.names == timms(name)] + 0.0).round(6))
        expected = sorted({value + 0.0 for value in timms_strengths(name, magnitude, SIZE)})
        assert drawn.tolist() == pytest.approx(expected, abs=2e-6), name


def test_randaugment_draws_timms_operations_equally_often_and_does_half_of_them() -> None:
    n = 60_000
    steps = draw("rand-m9-n2-mstd0.5-inc1", n)
    assert len(steps) == 2
    expected = {timms(name): 0.5 / 15 for name in _RAND_INCREASING_TRANSFORMS} | {"Identity": 0.5}
    assert len(expected) == 16
    for step in steps:
        assert_frequencies(Counter(step.names.tolist()), expected, n)
    both = np.mean((steps[0].names == "Identity") & (steps[1].names == "Identity"))
    assert both == pytest.approx(0.25, abs=0.01)
    assert len(draw("rand-m9-n3-inc1", 10)) == 3


def test_randaugments_magnitude_is_normal_around_its_mean_and_cut_off_at_0_and_10() -> None:
    (step,) = draw("rand-m9-n1-mstd0.5-inc1", 200_000)
    level = np.abs(step.strengths[step.names == "Rotate"]) / 3
    assert level.max() == 10
    assert np.mean(level == 10) == pytest.approx(1 - 0.97725, abs=0.01)  # two standard deviations above
    assert np.quantile(level, [0.16, 0.5, 0.84]) == pytest.approx([8.503, 9, 9.497], abs=0.05)
    assert level.min() > 6
    for edge, spec in ((0, "rand-m0-n1-mstd2-inc1"), (10, "rand-m10-n1-mstd2-inc1")):
        (step,) = draw(spec, 40_000)
        assert np.mean(np.abs(step.strengths[step.names == "Rotate"]) == 3 * edge) == pytest.approx(0.5, abs=0.06)


def test_trivial_augment_draws_torchvisions_space() -> None:
    n = 150_000
    (step,) = draw("trivial", n)
    table = TrivialAugmentWide()._augmentation_space(31)
    assert_frequencies(Counter(step.names.tolist()), {name: 1 / len(table) for name in table}, n)
    for name, (levels, signed) in table.items():
        magnitudes = levels.double().flatten().tolist()
        expected: Counter = Counter()
        for magnitude in magnitudes:
            both = [(name in ENHANCE) + sign * magnitude for sign in ((1, -1) if signed else (1,))]
            for strength in both:
                expected[round(strength, 4) + 0.0] += 1 / len(magnitudes) / len(both)
        chosen = step.strengths[step.names == name]
        nearby: Counter = Counter()
        for strength, count in Counter(chosen.tolist()).items():
            key = min(expected, key=lambda value: abs(value - strength))
            assert key == pytest.approx(strength, abs=2e-4), name
            nearby[key] += count
        assert_frequencies(nearby, expected, len(chosen))


@sweep("magnitude", [0, 2, 9, 10, 15, 20])
def test_randaugment_without_inc1_always_applied_beyond_10_is_timms(magnitude: int) -> None:
    random.seed(0)
    (step,) = draw(f"rand-m{magnitude}-n1-p1-mmax20", 20_000)
    names = {timms(name): 1 / len(_RAND_TRANSFORMS) for name in _RAND_TRANSFORMS}
    assert_frequencies(Counter(step.names.tolist()), names, 20_000)
    for name in _RAND_TRANSFORMS:
        drawn = np.unique((step.strengths[step.names == timms(name)] + 0.0).round(6))
        expected = sorted({value + 0.0 for value in timms_strengths(name, magnitude, SIZE)})
        assert drawn.tolist() == pytest.approx(expected, abs=2e-6), name


def test_three_augment_is_gray_solarized_at_128_or_blurred_by_a_tenth_to_two_pixels() -> None:
    n = 30_000
    (step,) = draw("3augment", n)
    thirds = dict.fromkeys(("Grayscale", "Solarize", "GaussianBlur"), 1 / 3)
    assert_frequencies(Counter(step.names.tolist()), thirds, n)
    assert set(step.strengths[step.names == "Solarize"]) == {128}
    sigma = step.strengths[step.names == "GaussianBlur"]
    assert 0.1 <= sigma.min() < 0.12
    assert 1.98 < sigma.max() <= 2
    assert np.quantile(sigma, [0.25, 0.5, 0.75]) == pytest.approx([0.575, 1.05, 1.525], abs=0.05)


@sweep("strength", [0.3, 1.0, 2.0])
def test_jitters_factors_lie_around_1_and_all_six_orders_occur(strength: float) -> None:
    n = 12_000
    steps = jitter_colors(strength, np.random.default_rng(0), n, SIZE)
    orders = Counter(zip(*(step.names.tolist() for step in steps), strict=True))
    assert_frequencies(orders, dict.fromkeys(permutations(("Brightness", "Contrast", "Color")), 1 / 6), n)
    least, most = max(0, 1 - strength), 1 + strength  # torchvision's ColorJitter: factors below 0 are cut off
    for name in ("Brightness", "Contrast", "Color"):
        factors = np.concatenate([step.strengths[step.names == name] for step in steps])
        assert len(factors) == n
        assert least <= factors.min() < least + 0.01 * (most - least)
        assert most >= factors.max() > most - 0.01 * (most - least)
        quartiles = [least + share * (most - least) for share in (0.25, 0.5, 0.75)]
        assert np.quantile(factors, [0.25, 0.5, 0.75]) == pytest.approx(quartiles, abs=0.05 * strength)


def test_no_policy_draws_nothing() -> None:
    assert create_policy("none", "cifar10") is None


@sweep(
    "spec",
    ["autoaugment", "autoaugment-imagenet", "rand-m9-n2-mstd0.5-inc1", "rand-m15-n2-p1-mmax20", "trivial", "3augment"],
)
def test_policies_draw_known_operations_the_same_for_the_same_seed(spec: str) -> None:
    one, same, other = draw(spec, 300), draw(spec, 300), draw(spec, 300, seed=1)
    for step, again in zip(one, same, strict=True):
        assert set(step.names.tolist()) <= {"Identity", *TABLES, *BLENDS, *GEOMETRY}
        assert step.strengths.shape == (300,)
        assert np.isfinite(step.strengths).all()
        assert step.names.tolist() == again.names.tolist()
        assert step.strengths.tolist() == again.strengths.tolist()
    assert any(step.names.tolist() != again.names.tolist() for step, again in zip(one, other, strict=True))


def test_slicing_a_step_slices_names_and_strengths() -> None:
    (step,) = draw("rand-m9-n1-inc1", 10)
    part = step.part(slice(4, 8))
    assert part.names.tolist() == step.names.tolist()[4:8]
    assert part.strengths.tolist() == step.strengths.tolist()[4:8]


@sweep(
    "spec",
    [
        "",
        "auto",
        "autoaugment-mnist",
        "Trivial",
        "rand-x9",
        "rand-m",
        "rand-m9-inc0",
        "rand-m1.2.3",
        "rand-m.",
        "tf-rand-m9",
        "randm9",
        "rand-m-9",
        "trivial ",
        "3augment-m9",
    ],
)
def test_unknown_policies_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(InputError, match=r"^--auto-augment") as caught:
        create_policy(spec, "cifar10")
    assert "\n" not in str(caught.value)
