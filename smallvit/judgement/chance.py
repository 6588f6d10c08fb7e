"""What chance alone does to accuracies: intervals, and a test of two models on the same images.

Resampling n images with replacement draws, of answers that are right or wrong, binomial counts (multinomial ones, for
two models). So the bootstrap's distribution is known: the percentiles of one accuracy are exact, and those of a
difference need counts to be drawn, not images. Where no answer is wrong, or none right, every resample is the same and
the bootstrap says nothing; the exact interval of Clopper and Pearson (1934) takes its place. So it does where all
images are alike for two models: where they never differ, or one knows all and the other none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binom, binomtest

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
RESAMPLES, SEED = 100_000, 0
METHODS = {"bootstrap": "95 % interval", "clopper-pearson": "95 % interval, exact"}
"""How an interval was found, in words."""
SIGNIFICANT = 0.05
"""Chance that is called more than chance."""


def accuracy_interval(correct: int, images: int) -> tuple[list[float], str]:
    """The 95 % interval of an accuracy in per cent, and how it was found: bootstrap percentiles, or Clopper-Pearson."""
    if correct in (0, images):
        found = binomtest(correct, images).proportion_ci(CONFIDENCE, method="exact")
        return [100 * float(found.low), 100 * float(found.high)], "clopper-pearson"
    return [100 * float(count) / images for count in binom.ppf(TAILS, images, correct / images)], "bootstrap"


def difference_interval(only_one: int, only_other: int, images: int) -> tuple[list[float], str]:
    """The 95 % interval of the difference of two accuracies in per cent, on the same images; and how it was found.

    Counted are the images that only the one model knows, and only the other. Where all images are of one kind, a share
    of at most u is of any other (Clopper and Pearson): the difference is then within u of 0, or 2 u of ±1.
    """
    same, gap = images - only_one - only_other, (only_one - only_other) / images
    if images in (only_one, only_other, same):
        reach = (1 + abs(gap)) * binomtest(0, images).proportion_ci(CONFIDENCE, method="exact").high
        ends, method = (max(-1, gap - reach), min(1, gap + reach)), "clopper-pearson"
    else:
        shares = [only_one / images, only_other / images, same / images]
        counts = np.random.default_rng(SEED).multinomial(images, shares, RESAMPLES)
        ends, method = np.quantile(counts[:, 0] - counts[:, 1], TAILS) / images, "bootstrap"
    return [100 * float(end) for end in ends], method


def paired(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Two models' answers to the same images, right or wrong: accuracies, their difference, and McNemar's test.

    The test is the exact one: whether images that only one model knows are shared out like the throws of a coin.
    Accuracies, and the difference with its 95 % interval, are in per cent; `p` is two-sided.
    """
    n, only_one, only_other = len(one), int((one & ~other).sum()), int((other & ~one).sum())
    both = only_one + only_other
    interval, method = difference_interval(only_one, only_other, n)
    return {
        "images": n,
        "top1": 100 * float(one.mean()),
        "other_top1": 100 * float(other.mean()),
        "difference": 100 * (only_one - only_other) / n,
        "interval": interval,
        "interval_method": method,
        "only_one": only_one,
        "only_other": only_other,
        "p": float(binomtest(only_one, both).pvalue) if both else 1.0,
    }


def in_words(found: dict[str, Any]) -> str:
    """What `paired` found, in a sentence."""
    gap, p = found["difference"], found["p"]
    low, high = found["interval"]
    method = METHODS[found["interval_method"]]
    sense = "more" if p < SIGNIFICANT else "not more"
    chance = f"McNemar p = {p:.2g}" if p >= 1e-4 else "McNemar p < 0.0001"
    return (
        f"{gap:+.2f} points ({method} {low:+.2f} to {high:+.2f}): {sense} than chance would give ({chance}; "
        f"{found['only_one']:,} images only the first knows, {found['only_other']:,} only the second)"
    )
