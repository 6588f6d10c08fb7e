"""What training minimises, against the equations of DeiT's paper and code written out with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smallvit.objectives import distilled, divergence, label_loss, supervised
from smallvit.options import DistillConfig
from smallvit.teachers import distillation

B, K = 6, 5


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture
def drawn() -> dict[str, Tensor]:
    """Logits of two heads and of a teacher, and mixed labels."""
    rng = torch.Generator().manual_seed(0)
    student, other, teacher = torch.randn(3, B, K, generator=rng, dtype=torch.float64).mul(3).unbind()
    targets = torch.rand(B, K, generator=rng, dtype=torch.float64)
    return {"student": student, "other": other, "teacher": teacher, "targets": targets / targets.sum(1, keepdim=True)}


class Fixed(nn.Module):
    """A model that gives what it is told to, whatever it sees."""

    def __init__(self, *heads: Tensor) -> None:
        super().__init__()
        self.heads = nn.ParameterList(nn.Parameter(head.float()) for head in heads)

    def forward(self, images: Tensor) -> Any:
        return tuple(self.heads) if len(self.heads) > 1 else self.heads[0]


def cross_entropy(logits: np.ndarray, targets: np.ndarray, smoothing: float = 0.0) -> float:
    targets = (1 - smoothing) * targets + smoothing / K
    return float(-(targets * np.log(softmax(logits))).sum(axis=1).mean())


def kullback_leibler(logits: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(logits / temperature)
    return float((p * np.log(p / q)).sum(axis=1).mean())


IMAGES = torch.zeros(B, 3, 8, 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("temperature", "weight"), [(3.0, 0.1), (1.0, 0.5)])
def test_soft_distillation_is_the_papers_equation(
    drawn: dict[str, Tensor], temperature: float, weight: float, smoothing: float
) -> None:
    found = distilled(
        Fixed(drawn["student"]), IMAGES, drawn["targets"].float(), drawn["teacher"].float(),
        smoothing=smoothing, soft=True, weight=weight, temperature=temperature,
    )  # fmt: skip
    s, t, y = (drawn[name].numpy() for name in ("student", "teacher", "targets"))
    expected = (1 - weight) * cross_entropy(s, y, smoothing) + weight * temperature**2 * kullback_leibler(
        s, t, temperature
    )
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_official_form_divides_by_the_number_of_classes_too(drawn: dict[str, Tensor]) -> None:
    s, t = drawn["student"], drawn["teacher"]
    expected = 4 * kullback_leibler(s.numpy(), t.numpy(), 2.0) / K
    assert divergence(s.float(), t.float(), 2.0, per_class=True).item() == pytest.approx(expected, rel=1e-5)
    literal = nn.functional.kl_div(  # as the reference facts state DeiT's code: sum over numel
        (s / 2).log_softmax(1), (t / 2).log_softmax(1), reduction="sum", log_target=True
    ) * (2 * 2) / s.numel()  # fmt: skip
    assert literal.item() == pytest.approx(expected, rel=1e-6)


def test_hard_distillation_learns_the_teachers_first_choice(drawn: dict[str, Tensor]) -> None:
    found = distilled(
        Fixed(drawn["student"]), IMAGES, drawn["targets"].float(), drawn["teacher"].float(),
        smoothing=0.1, soft=False, weight=0.5,
    )  # fmt: skip
    s, y = drawn["student"].numpy(), drawn["targets"].numpy()
    choice = np.eye(K)[drawn["teacher"].numpy().argmax(1)]  # not smoothed
    assert found["loss"].item() == pytest.approx(0.5 * cross_entropy(s, y, 0.1) + 0.5 * cross_entropy(s, choice), 1e-5)


def test_with_two_heads_labels_teach_the_first_and_the_teacher_the_second(drawn: dict[str, Tensor]) -> None:
    model = Fixed(drawn["student"], drawn["other"])
    found = distilled(
        model, IMAGES, drawn["targets"].float(), drawn["teacher"].float(), smoothing=0.0, soft=False, weight=0.3
    )
    found["loss"].backward()
    s, o, t, y = (drawn[name].numpy() for name in ("student", "other", "teacher", "targets"))
    choice = np.eye(K)[t.argmax(1)]
    assert found["loss"].item() == pytest.approx(0.7 * cross_entropy(s, y) + 0.3 * cross_entropy(o, choice), rel=1e-5)
    np.testing.assert_allclose(model.heads[0].grad.numpy(), 0.7 * (softmax(s) - y) / B, atol=1e-6)
    np.testing.assert_allclose(model.heads[1].grad.numpy(), 0.3 * (softmax(o) - choice) / B, atol=1e-6)
    torch.testing.assert_close(found["logits"], model.heads[0])


@pytest.mark.parametrize("per_class", [False, True])
def test_the_gradient_of_the_divergence_is_temperature_times_the_difference_of_probabilities(
    drawn: dict[str, Tensor], per_class: bool
) -> None:
    logits, temperature = drawn["student"].float().requires_grad_(), 3.0
    divergence(logits, drawn["teacher"].float(), temperature, per_class).backward()
    s, t = drawn["student"].numpy() / temperature, drawn["teacher"].numpy() / temperature
    expected = temperature * (softmax(s) - softmax(t)) / (B * (K if per_class else 1))
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-6)


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn_from_it(drawn: dict[str, Tensor]) -> None:
    t = drawn["teacher"].float()
    assert divergence(t, t + 7, 3.0).item() == pytest.approx(0, abs=1e-5)  # logits count up to a constant


def test_the_binary_loss_takes_every_label_of_a_mixed_image_as_whole(drawn: dict[str, Tensor]) -> None:
    targets = torch.zeros(B, K)
    targets[:, 1], targets[:, 3] = 0.3, 0.7
    s = drawn["student"].numpy()
    p, y = 1 / (1 + np.exp(-s)), (targets.numpy() > 0).astype(float)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert label_loss(drawn["student"], targets, 0.0, "bce").item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_judged_in_full(drawn: dict[str, Tensor]) -> None:
    model = Fixed(drawn["student"]).bfloat16()
    for loss in (
        supervised(model, IMAGES, drawn["targets"].float(), smoothing=0.1)["loss"],
        distilled(
            model, IMAGES, drawn["targets"].float(), drawn["teacher"].half(), smoothing=0.1, soft=True, weight=0.5
        )["loss"],
    ):
        assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "soft", "weight", "temperature", "per_class"),
    [
        ({}, False, 0.5, 1.0, False),
        ({"distill": "token"}, False, 0.5, 1.0, False),
        ({"distill": "soft"}, True, 0.1, 3.0, False),  # arXiv:2012.12877, section 6
        ({"distill": "soft", "distill_values": "official"}, True, 0.5, 1.0, True),  # DeiT's code, its defaults
        ({"distill": "soft", "distill_weight": 0.9, "distill_temperature": 4.0}, True, 0.9, 4.0, False),
    ],
)
def test_published_values_are_taken_unless_others_are_given(
    options: dict[str, Any], soft: bool, weight: float, temperature: float, per_class: bool
) -> None:
    expected = {"soft": soft, "weight": weight, "temperature": temperature, "per_class": per_class}
    assert distillation(DistillConfig(teacher="runs/cnn", **options)) == expected
