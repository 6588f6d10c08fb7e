"""Test DINO's loss, center and teacher against loops written from the equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smallvit.training.dino import Head, Teacher, dino_loss, teacher_temperature


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_mean_cross_entropy_of_pairs_of_different_views() -> None:
    b, g, v, k = 3, 2, 5, 7
    student, teacher, center = random(b, v, k), random(b, g, k, seed=1), random(k, seed=2)
    terms = []
    for image in range(b):
        for one in range(g):
            for other in range(v):
                if one != other:
                    p = torch.softmax((teacher[image, one] - center) / 0.05, dim=0)
                    terms.append(nn.functional.cross_entropy(student[image, other] / 0.1, p))
    torch.testing.assert_close(dino_loss(student, teacher, center, 0.05), torch.stack(terms).mean())


def test_no_gradient_reaches_the_teacher() -> None:
    student = nn.Linear(3, 4)
    teacher = Teacher(student, 4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(
        torch.equal(one, other) for one, other in zip(teacher.model.parameters(), student.parameters(), strict=True)
    )


def test_the_teacher_is_a_moving_average_whose_momentum_rises_to_one() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = Teacher(student, 2)
    start = teacher.model[0].weight.clone()
    with torch.no_grad():
        student[0].weight += 1
        student[1].running_mean += 5
    teacher.update(student, 0.0)
    torch.testing.assert_close(teacher.model[0].weight, 0.996 * start + 0.004 * (start + 1))
    assert torch.equal(teacher.model[1].running_mean, student[1].running_mean)
    before = teacher.model[0].weight.clone()
    teacher.update(student, 1.0)
    assert torch.equal(teacher.model[0].weight, before)
    teacher.update(student, 0.5)
    torch.testing.assert_close(teacher.model[0].weight, 0.998 * before + 0.002 * student[0].weight)


def test_the_center_follows_the_outputs() -> None:
    teacher = Teacher(nn.Linear(2, 3), 3)
    teacher.move_center(torch.tensor([1.0, 2.0, 3.0]))
    teacher.move_center(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(teacher.center, 0.19 * torch.tensor([1.0, 2.0, 3.0]))


def test_the_temperature_rises_over_the_first_tenth() -> None:
    assert [teacher_temperature(share) for share in (0.0, 0.05, 0.1, 1.0)] == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_outputs_are_cosines_with_the_prototypes() -> None:
    head = Head(6, 5)
    x = random(4, 6)
    expected = nn.functional.cosine_similarity(head.mlp(x)[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(head(x), expected)
    assert head(x).abs().max() <= 1 + 1e-6
