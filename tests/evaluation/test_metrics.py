"""Test metrics and intervals against scikit-learn, scipy and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, top_k_accuracy_score
from torch import nn

from smallvit.datasets.loader import IGNORED_LABEL
from smallvit.evaluation import metrics, stats
from smallvit.evaluation.evaluate import evaluate
from smallvit.evaluation.metrics import Outputs
from smallvit.utils.errors import InputError

CLASSES = tuple("abcdefg")


def create_outputs(n: int = 500, k: int = 7, seed: int = 0, rows: int = 64) -> tuple[Outputs, np.ndarray, np.ndarray]:
    """Return outputs concatenated from batches, probabilities, and labels that the logits favor."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = torch.tensor(rng.normal(0, 1.5, (n, k)) + 2 * np.eye(k)[labels], dtype=torch.float32)
    batches = [
        metrics.reduce_logits(
            logits[at : at + rows], torch.tensor(labels[at : at + rows]), torch.arange(n)[at : at + rows]
        )
        for at in range(0, n, rows)
    ]
    return metrics.concatenate(batches), logits.double().softmax(1).numpy(), labels


def test_metrics_equal_scikit_learn() -> None:
    result, probabilities, labels = create_outputs()
    figures = metrics.compute_metrics(result, CLASSES)
    predicted = probabilities.argmax(axis=1)
    assert figures["images"] == 500
    assert figures["top1"] == pytest.approx(100 * accuracy_score(labels, predicted))
    assert figures["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, probabilities, k=5))
    assert figures["loss"] == pytest.approx(log_loss(labels, probabilities))
    assert figures["macro"]["f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))


def test_evaluation_during_training_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(6, 200, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0])  # the last class has no images, but is predicted
    logits = torch.tensor(rng.normal(0, 1, (200, 6)) + 1.5 * np.eye(6)[labels], dtype=torch.float32)
    ignored = torch.full((1,), IGNORED_LABEL)
    batches = [
        (logits[:90], torch.tensor(labels[:90])),
        (logits[:1], ignored),
        (logits[90:], torch.tensor(labels[90:])),
    ]
    figures = evaluate(nn.Identity(), batches, torch.device("cpu"), torch.float32)
    predicted = logits.argmax(1).numpy()
    f1 = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    outputs = metrics.reduce_logits(logits, torch.tensor(labels), torch.arange(200))
    for each in (figures, metrics.compute_metrics(outputs, CLASSES[:6])):
        assert each["top1"] == pytest.approx(100 * accuracy_score(labels, predicted))
        assert each["macro_f1"] == pytest.approx(100 * f1)
        with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
            assert each["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert figures["images"] == 200


def test_top5_is_100_percent_with_few_classes() -> None:
    result, *_ = create_outputs(k=4)
    assert metrics.compute_metrics(result, CLASSES[:4])["top5"] == 100


def test_precision_and_recall_follow_from_the_confusion_matrix() -> None:
    result, *_ = create_outputs()
    figures = metrics.compute_metrics(result, CLASSES)
    confusion = np.array(figures["confusion"])
    for number, each in enumerate(figures["classes"]):
        hits = 100 * confusion[number, number]
        assert each["recall"] == pytest.approx(hits / confusion[number].sum())
        assert each["precision"] == pytest.approx(hits / confusion[:, number].sum())
        assert each["f1"] == pytest.approx(2 * hits / (confusion[number].sum() + confusion[:, number].sum()))
        assert each["images"] == confusion[number].sum() == (result.label == number).sum()


def test_classes_without_images_have_no_metrics() -> None:
    labels = torch.tensor([0, 0, 1])
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 9.0, 0, 0]])
    result = metrics.compute_metrics(metrics.reduce_logits(logits, labels, torch.arange(3)), CLASSES[:4])
    assert [each["recall"] for each in result["classes"]] == [50, 100, None, None]
    assert result["macro"]["recall"] == 75
    assert np.shape(result["confusion"]) == (4, 4)


def test_precision_of_a_class_that_is_never_predicted_is_zero() -> None:
    result = metrics.reduce_logits(torch.tensor([[9.0, 0], [9.0, 0]]), torch.tensor([0, 1]), torch.arange(2))
    assert metrics.compute_class_metrics(result, CLASSES[:2])["classes"][1] == {
        "name": "b",
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "images": 1,
    }


def test_calibration_error_equals_a_naive_loop() -> None:
    result, *_ = create_outputs(1000)
    gaps = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i in range(1000) if low < result.probability[i] <= high]
        if inside:
            accuracy = sum(result.label[i] == result.predicted[i] for i in inside) / len(inside)
            confidence = sum(result.probability[i] for i in inside) / len(inside)
            gaps += len(inside) / 1000 * abs(accuracy - confidence)
    assert metrics.compute_metrics(result, CLASSES)["ece"] == pytest.approx(100 * gaps)


def test_bins_contain_each_image_once_and_empty_bins_are_none() -> None:
    bins = metrics.bin_confidence(np.array([1 / 15, 0.5, 1.0, 1.0]), np.array([True, False, True, True]))
    assert [each["images"] for each in bins] == [1, *[0] * 6, 1, *[0] * 6, 2]
    assert (bins[14]["accuracy"], bins[14]["confidence"]) == (100, 1)
    assert bins[3]["accuracy"] is bins[3]["confidence"] is None


def test_ties_rank_the_first_class_first() -> None:
    result = metrics.reduce_logits(torch.zeros(7, 7), torch.arange(7), torch.arange(7))
    assert result.rank.tolist() == list(range(7))
    assert metrics.compute_metrics(result, CLASSES)["top5"] == pytest.approx(500 / 7)
    assert result.top1 == pytest.approx(100 / 7)


def test_concatenating_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="none of the images can be decoded"):
        metrics.concatenate([])


@pytest.mark.parametrize(("correct", "images"), [(340, 359), (5000, 10000), (30, 200)])
def test_interval_equals_the_bootstrap_and_is_close_to_the_normal_approximation(correct: int, images: int) -> None:
    interval, method = stats.accuracy_interval(correct, images)
    share = correct / images
    drawn = bootstrap(
        (np.arange(images) < correct,), np.mean, n_resamples=4000, batch=100, method="percentile", random_state=0
    ).confidence_interval
    spread = 100 * math.sqrt(share * (1 - share) / images)
    assert method == "bootstrap"
    assert interval == pytest.approx([100 * drawn.low, 100 * drawn.high], abs=0.15 * spread + 100 / images)
    assert interval == pytest.approx([100 * share - 1.96 * spread, 100 * share + 1.96 * spread], abs=0.25 * spread)


@pytest.mark.parametrize(("correct", "expected"), [(0, (0, 3.6217)), (100, (96.3783, 100))])
def test_interval_at_0_and_100_percent_is_clopper_pearson(correct: int, expected: tuple[float, float]) -> None:
    interval, method = stats.accuracy_interval(correct, 100)  # 1 - 0.025 ** (1 / 100) is 3.6217 %
    assert method == "clopper-pearson"
    assert interval == pytest.approx(expected, abs=1e-4)


def test_mcnemar_p_value_sums_binomial_tails() -> None:
    one, other = np.zeros(100, bool), np.zeros(100, bool)
    one[:12] = True  # 12 only the first is correct on
    other[12:22] = True  # 10 only the second is correct on
    one[50:90] = other[50:90] = True
    result = stats.compare_paired(one, other)
    tail = sum(math.comb(22, k) for k in range(11)) / 2**22
    assert result["p"] == pytest.approx(min(1, 2 * tail))
    assert (result["only_one"], result["only_other"], result["images"]) == (12, 10, 100)
    assert (result["top1"], result["other_top1"], result["difference"]) == (52, 50, 2)


def test_interval_of_the_difference_equals_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.random(400) < 0.9, rng.random(400) < 0.8
    result = stats.compare_paired(one, other)
    gaps = one.astype(int) - other
    drawn = bootstrap((gaps,), np.mean, n_resamples=4000, method="percentile", random_state=0).confidence_interval
    assert result["interval"] == pytest.approx([100 * drawn.low, 100 * drawn.high], abs=0.4)
    assert result["p"] == pytest.approx(binomtest(int((gaps > 0).sum()), int((gaps != 0).sum())).pvalue)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(1, 1, (-3.6217, 3.6217)), (0, 0, (-3.6217, 3.6217)), (1, 0, (92.7566, 100)), (0, 1, (-100, -92.7566))],
)
def test_interval_of_the_difference_is_clopper_pearson_if_models_always_or_never_differ(
    one: int, other: int, expected: tuple[float, float]
) -> None:
    result = stats.compare_paired(
        np.full(100, bool(one)), np.full(100, bool(other))
    )  # 1 - 0.025 ** (1 / 100) is 3.6217 %
    assert result["interval"] == pytest.approx(expected, abs=1e-4)
    assert result["interval_method"] == "clopper-pearson"
    assert "points (95 % Clopper-Pearson interval " in stats.format_comparison(result)


@pytest.mark.parametrize(("gain", "words"), [(12, ", not significant"), (40, ", significant")])
def test_format_comparison_reports_significance(gain: int, words: str) -> None:
    one, other = np.arange(100) < gain, (np.arange(100) >= 50) & (np.arange(100) < 60)
    sentence = stats.format_comparison(stats.compare_paired(one, other))
    assert words in sentence
    assert f"only the first is correct on {gain} images, only the second on 10" in sentence
    assert sentence.startswith(f"{gain - 10:+.2f} points")
