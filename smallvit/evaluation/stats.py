"""Compute intervals of accuracies, test the difference of two models on the same images, and list confusions.

Resampling n images with replacement draws binomial counts of correct predictions (multinomial counts for two models).
The bootstrap distribution is therefore known: percentiles of one accuracy are exact, and those of a difference need
counts to be drawn, not images. Where every resample is the same, as for an accuracy of 0 or 100 %, the interval of
Clopper and Pearson (1934) replaces the bootstrap's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binom, binomtest, t

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
RESAMPLES, SEED = 100_000, 0
METHODS = {"bootstrap": "95 % interval", "clopper-pearson": "95 % Clopper-Pearson interval"}
"""How an interval was computed, in words."""
SIGNIFICANCE = 0.05
"""Largest p-value of a significant difference."""
UNEQUAL = 1.5
"""Ratio of the largest to the smallest class from which means over classes are printed."""


def accuracy_interval(correct: int, images: int) -> tuple[list[float], str]:
    """Compute the 95 % interval of an accuracy in percent; return it and the method (see `METHODS`)."""
    if correct in (0, images):
        interval = binomtest(correct, images).proportion_ci(CONFIDENCE, method="exact")
        return [100 * float(interval.low), 100 * float(interval.high)], "clopper-pearson"
    return [100 * float(count) / images for count in binom.ppf(TAILS, images, correct / images)], "bootstrap"


def difference_interval(only_first: int, only_second: int, images: int) -> tuple[list[float], str]:
    """Compute the 95 % interval of the difference of two accuracies on the same images, in percentage points.

    If the models agree on all images, or one is correct on all and the other on none, the share of any other outcome is
    at most u (Clopper and Pearson): the difference is then within u of 0, or 2 u of ±1.

    Args:
        only_first: Images that only the first model classifies correctly.
        only_second: Images that only the second model classifies correctly.
        images: All images.

    Returns:
        The interval and the method (see `METHODS`).
    """
    same, difference = images - only_first - only_second, (only_first - only_second) / images
    if images in (only_first, only_second, same):
        reach = (1 + abs(difference)) * binomtest(0, images).proportion_ci(CONFIDENCE, method="exact").high
        ends, method = (max(-1, difference - reach), min(1, difference + reach)), "clopper-pearson"
    else:
        shares = [only_first / images, only_second / images, same / images]
        counts = np.random.default_rng(SEED).multinomial(images, shares, RESAMPLES)
        ends, method = np.quantile(counts[:, 0] - counts[:, 1], TAILS) / images, "bootstrap"
    return [100 * float(end) for end in ends], method


def compare_paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Compare two models by their correct predictions for the same images.

    Returns:
        Accuracies, their difference and its 95 % interval in percent, and `p` of the exact two-sided McNemar test.
    """
    n, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    interval, method = difference_interval(only_first, only_second, n)
    return {
        "images": n,
        "top1": 100 * float(first.mean()),
        "other_top1": 100 * float(second.mean()),
        "difference": 100 * (only_first - only_second) / n,
        "interval": interval,
        "interval_method": method,
        "only_one": only_first,
        "only_other": only_second,
        "p": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    }


def corrected_t_test(differences: Sequence[float], test_share: float) -> dict[str, Any]:
    """Test whether the mean difference of two models over the folds of (repeated) cross-validations is 0.

    Training sets of folds overlap, so their results vary less than those of independent experiments. The variance of
    the mean is therefore (1/J + n_test/n_train) times that of the J differences (the corrected resampled t-test of
    Nadeau and Bengio 2003, equation 9, doi:10.1023/A:1024068626366).

    Args:
        differences: Difference in each fold, in points.
        test_share: n_test/n_train.

    Returns:
        The mean difference, its 95 % interval, `t`, degrees of freedom `df`, and the two-sided `p`.
    """
    count, mean = len(differences), float(np.mean(differences))
    error = float(np.sqrt((1 / count + test_share) * np.var(differences, ddof=1)))
    statistic = mean / error if error else float(np.copysign(np.inf, mean)) if mean else 0.0
    reach = float(t.ppf(TAILS[1], count - 1)) * error
    p = 2 * float(t.sf(abs(statistic), count - 1))
    return {"difference": mean, "interval": [mean - reach, mean + reach], "t": statistic, "df": count - 1, "p": p}


def format_t_test(comparison: dict[str, Any]) -> str:
    """Describe the result of `corrected_t_test` in a sentence."""
    low, high = comparison["interval"]
    p = comparison["p"]
    return (
        f"{comparison['difference']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}), "
        f"{'significant' if p < SIGNIFICANCE else 'not significant'} (corrected resampled t-test, "
        f"{comparison['df']} degrees of freedom, p {f'= {p:.2g}' if p >= 1e-4 else '< 0.0001'})"
    )


def format_comparison(comparison: dict[str, Any]) -> str:
    """Describe the result of `compare_paired` in a sentence."""
    difference, p = comparison["difference"], comparison["p"]
    low, high = comparison["interval"]
    method = METHODS[comparison["interval_method"]]
    significant = "significant" if p < SIGNIFICANCE else "not significant"
    test = f"McNemar p = {p:.2g}" if p >= 1e-4 else "McNemar p < 0.0001"
    return (
        f"{difference:+.2f} points ({method} {low:+.2f} to {high:+.2f}), {significant} ({test}; only the first is "
        f"correct on {comparison['only_one']:,} images, only the second on {comparison['only_other']:,})"
    )


def has_unequal_classes(record: dict[str, Any]) -> bool:
    """Return whether the classes of a run's or an evaluation's data have clearly unequal numbers of images."""
    return record.get("imbalance_ratio", 1) >= UNEQUAL


def format_class_means(record: dict[str, Any], prefix: str = "") -> str:
    """Format macro F1 and balanced accuracy; empty if the classes have about equal numbers of images.

    With several labels an image: macro and micro F1.
    """
    if prefix + "micro_f1" in record:
        return f"macro F1 {record[prefix + 'macro_f1']:.2f} %   micro F1 {record[prefix + 'micro_f1']:.2f} %"
    if not has_unequal_classes(record):
        return ""
    f1, balanced = (record[prefix + name] for name in ("macro_f1", "balanced_accuracy"))
    return f"macro F1 {f1:.2f} %   balanced accuracy {balanced:.2f} %"


def list_confusions(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the confusions, the most frequent first: true and predicted class, images, percentage of the true class.

    Args:
        metrics: The contents of metrics.json.
    """
    names = [each["name"] for each in metrics["classes"]]
    pairs = [
        {"true": names[i], "predicted": names[j], "images": count, "share": 100 * count / sum(row)}
        for i, row in enumerate(metrics["confusion"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair["images"])
