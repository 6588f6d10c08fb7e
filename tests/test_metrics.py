"""Numbers from logits and labels, against scikit-learn's, scipy's and those of loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from smallvit.errors import InputError
from smallvit.judgement import chance, metrics
from smallvit.judgement.metrics import Answers

CLASSES = tuple("abcdefg")


def answers(n: int = 500, k: int = 7, seed: int = 0, rows: int = 64) -> tuple[Answers, np.ndarray, np.ndarray]:
    """Answers in batches, the probabilities, and the labels, which the logits favour."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = torch.tensor(rng.normal(0, 1.5, (n, k)) + 2 * np.eye(k)[labels], dtype=torch.float32)
    batches = [
        metrics.reduced(logits[at : at + rows], torch.tensor(labels[at : at + rows]), torch.arange(n)[at : at + rows])
        for at in range(0, n, rows)
    ]
    return metrics.joined(batches), logits.double().softmax(1).numpy(), labels


def test_figures_are_scikit_learns() -> None:
    found, probabilities, labels = answers()
    figures = metrics.figures(found, CLASSES)
    predicted = probabilities.argmax(axis=1)
    assert figures["images"] == 500
    assert figures["top1"] == pytest.approx(100 * accuracy_score(labels, predicted))
    assert figures["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, probabilities, k=5))
    assert figures["loss"] == pytest.approx(log_loss(labels, probabilities))
    assert figures["macro"]["f1"] == pytest.approx(100 * f1_score(labels, predicted, average="macro"))


def test_of_few_classes_top_five_is_all() -> None:
    found, *_ = answers(k=4)
    assert metrics.figures(found, CLASSES[:4])["top5"] == 100


def test_precision_and_recall_follow_from_the_confusion_matrix() -> None:
    found, *_ = answers()
    figures = metrics.figures(found, CLASSES)
    confusion = np.array(figures["confusion"])
    for number, each in enumerate(figures["classes"]):
        hits = 100 * confusion[number, number]
        assert each["recall"] == pytest.approx(hits / confusion[number].sum())
        assert each["precision"] == pytest.approx(hits / confusion[:, number].sum())
        assert each["f1"] == pytest.approx(2 * hits / (confusion[number].sum() + confusion[:, number].sum()))
        assert each["images"] == confusion[number].sum() == (found.label == number).sum()


def test_classes_without_images_have_no_figures_and_do_not_count() -> None:
    labels = torch.tensor([0, 0, 1])
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 9.0, 0, 0]])
    found = metrics.figures(metrics.reduced(logits, labels, torch.arange(3)), CLASSES[:4])
    assert [each["recall"] for each in found["classes"]] == [50, 100, None, None]
    assert found["macro"]["recall"] == 75
    assert np.shape(found["confusion"]) == (4, 4)


def test_a_class_that_is_never_predicted_has_a_precision_of_zero() -> None:
    found = metrics.reduced(torch.tensor([[9.0, 0], [9.0, 0]]), torch.tensor([0, 1]), torch.arange(2))
    assert metrics.per_class(found, CLASSES[:2])["classes"][1] == {
        "name": "b",
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "images": 1,
    }


def test_calibration_error_is_that_of_a_naive_loop() -> None:
    found, *_ = answers(1000)
    gaps = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i in range(1000) if low < found.probability[i] <= high]
        if inside:
            accuracy = sum(found.label[i] == found.predicted[i] for i in inside) / len(inside)
            confidence = sum(found.probability[i] for i in inside) / len(inside)
            gaps += len(inside) / 1000 * abs(accuracy - confidence)
    assert metrics.figures(found, CLASSES)["ece"] == pytest.approx(100 * gaps)


def test_bins_hold_every_image_once_and_empty_ones_say_nothing() -> None:
    bins = metrics.reliability(np.array([1 / 15, 0.5, 1.0, 1.0]), np.array([True, False, True, True]))
    assert [each["images"] for each in bins] == [1, *[0] * 6, 1, *[0] * 6, 2]
    assert (bins[14]["accuracy"], bins[14]["confidence"]) == (100, 1)
    assert bins[3]["accuracy"] is bins[3]["confidence"] is None


def test_equal_logits_rank_the_first_class_first() -> None:
    found = metrics.reduced(torch.zeros(7, 7), torch.arange(7), torch.arange(7))
    assert found.rank.tolist() == list(range(7))
    assert metrics.figures(found, CLASSES)["top5"] == pytest.approx(500 / 7)
    assert found.top1 == pytest.approx(100 / 7)


def test_without_answers_there_are_no_figures() -> None:
    with pytest.raises(InputError, match="none of the images to be judged can be decoded"):
        metrics.joined([])


@pytest.mark.parametrize(("correct", "images"), [(340, 359), (5000, 10000), (30, 200)])
def test_the_interval_is_the_bootstraps_and_near_the_normal_distributions(correct: int, images: int) -> None:
    interval, method = chance.accuracy_interval(correct, images)
    share = correct / images
    drawn = bootstrap(
        (np.arange(images) < correct,), np.mean, n_resamples=4000, batch=100, method="percentile", random_state=0
    ).confidence_interval
    spread = 100 * math.sqrt(share * (1 - share) / images)
    assert method == "bootstrap"
    assert interval == pytest.approx([100 * drawn.low, 100 * drawn.high], abs=0.15 * spread + 100 / images)
    assert interval == pytest.approx([100 * share - 1.96 * spread, 100 * share + 1.96 * spread], abs=0.25 * spread)


@pytest.mark.parametrize(("correct", "expected"), [(0, (0, 3.6217)), (100, (96.3783, 100))])
def test_where_the_bootstrap_collapses_the_interval_is_exact(correct: int, expected: tuple[float, float]) -> None:
    interval, method = chance.accuracy_interval(correct, 100)  # 1 - 0.025 ** (1 / 100) is 3.6217 %
    assert method == "clopper-pearson"
    assert interval == pytest.approx(expected, abs=1e-4)


def test_mcnemar_sums_the_tails_of_a_coins_distribution() -> None:
    one, other = np.zeros(100, bool), np.zeros(100, bool)
    one[:12] = True  # 12 that only the first knows
    other[12:22] = True  # 10 that only the second knows
    one[50:90] = other[50:90] = True
    found = chance.paired(one, other)
    tail = sum(math.comb(22, k) for k in range(11)) / 2**22
    assert found["p"] == pytest.approx(min(1, 2 * tail))
    assert (found["only_one"], found["only_other"], found["images"]) == (12, 10, 100)
    assert (found["top1"], found["other_top1"], found["difference"]) == (52, 50, 2)


def test_the_differences_interval_is_the_paired_bootstraps() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.random(400) < 0.9, rng.random(400) < 0.8
    found = chance.paired(one, other)
    gaps = one.astype(int) - other
    drawn = bootstrap((gaps,), np.mean, n_resamples=4000, method="percentile", random_state=0).confidence_interval
    assert found["interval"] == pytest.approx([100 * drawn.low, 100 * drawn.high], abs=0.4)
    assert found["p"] == pytest.approx(binomtest(int((gaps > 0).sum()), int((gaps != 0).sum())).pvalue)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(1, 1, (-3.6217, 3.6217)), (0, 0, (-3.6217, 3.6217)), (1, 0, (92.7566, 100)), (0, 1, (-100, -92.7566))],
)
def test_where_models_never_differ_or_always_do_the_differences_interval_is_exact(
    one: int, other: int, expected: tuple[float, float]
) -> None:
    found = chance.paired(np.full(100, bool(one)), np.full(100, bool(other)))  # 1 - 0.025 ** (1 / 100) is 3.6217 %
    assert found["interval"] == pytest.approx(expected, abs=1e-4)
    assert found["interval_method"] == "clopper-pearson"
    assert "points (95 % interval, exact " in chance.in_words(found)


@pytest.mark.parametrize(("gain", "words"), [(12, "not more than chance"), (40, ": more than chance")])
def test_a_sentence_says_whether_it_may_be_chance(gain: int, words: str) -> None:
    one, other = np.arange(100) < gain, (np.arange(100) >= 50) & (np.arange(100) < 60)
    sentence = chance.in_words(chance.paired(one, other))
    assert words in sentence
    assert f"{gain} images only the first knows, 10 only the second" in sentence
    assert sentence.startswith(f"{gain - 10:+.2f} points")
