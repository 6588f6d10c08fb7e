"""Compare losses with the equations of DeiT's paper and code, written with NumPy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from smallvit.cli import main
from smallvit.cli.parser import options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config
from smallvit.config.options import DistillConfig, OptimConfig
from smallvit.training import losses
from smallvit.training.launch import apply_regularization, warn_ineffective
from smallvit.training.losses import LOSSES, Loss, Objective, binary_cross_entropy, create_objective, soft_distillation
from smallvit.utils.errors import InputError

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
    """A model that returns given logits for any images."""

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


def objective(loss: str = "ce", label_smoothing: float = 0.0, **distill: Any) -> Objective:
    teacher = {"teacher": "runs/cnn"} if distill else {}
    return create_objective(
        OptimConfig(loss=loss, label_smoothing=label_smoothing), DistillConfig(**teacher, **distill)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("temperature", "weight"), [(3.0, 0.1), (1.0, 0.5)])
def test_soft_distillation_is_the_papers_equation(
    drawn: dict[str, Tensor], temperature: float, weight: float, smoothing: float
) -> None:
    rule = objective("ce", smoothing, distill="soft", distill_weight=weight, distill_temperature=temperature)
    parts = rule(Fixed(drawn["student"]), IMAGES, drawn["targets"].float(), drawn["teacher"].float())
    s, t, y = (drawn[name].numpy() for name in ("student", "teacher", "targets"))
    expected = (1 - weight) * cross_entropy(s, y, smoothing) + weight * temperature**2 * kullback_leibler(
        s, t, temperature
    )
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_the_official_form_divides_by_the_number_of_classes_too(drawn: dict[str, Tensor]) -> None:
    s, t = drawn["student"], drawn["teacher"]
    expected = 4 * kullback_leibler(s.numpy(), t.numpy(), 2.0) / K
    assert soft_distillation(s.float(), t.float(), temperature=2.0, per_class=True).item() == pytest.approx(
        expected, rel=1e-5
    )
    literal = nn.functional.kl_div(  # as the reference facts state DeiT's code: sum over numel
        (s / 2).log_softmax(1), (t / 2).log_softmax(1), reduction="sum", log_target=True
    ) * (2 * 2) / s.numel()  # fmt: skip
    assert literal.item() == pytest.approx(expected, rel=1e-6)


def test_hard_distillation_learns_the_teachers_first_choice(drawn: dict[str, Tensor]) -> None:
    rule = objective("ce", 0.1, distill="hard")
    parts = rule(Fixed(drawn["student"]), IMAGES, drawn["targets"].float(), drawn["teacher"].float())
    s, y = drawn["student"].numpy(), drawn["targets"].numpy()
    choice = np.eye(K)[drawn["teacher"].numpy().argmax(1)]  # not smoothed
    assert parts["loss"].item() == pytest.approx(0.5 * cross_entropy(s, y, 0.1) + 0.5 * cross_entropy(s, choice), 1e-5)


def test_with_two_heads_labels_teach_the_first_and_the_teacher_the_second(drawn: dict[str, Tensor]) -> None:
    model = Fixed(drawn["student"], drawn["other"])
    rule = objective(distill="token", distill_weight=0.3)
    parts = rule(model, IMAGES, drawn["targets"].float(), drawn["teacher"].float())
    parts["loss"].backward()
    s, o, t, y = (drawn[name].numpy() for name in ("student", "other", "teacher", "targets"))
    choice = np.eye(K)[t.argmax(1)]
    assert parts["loss"].item() == pytest.approx(0.7 * cross_entropy(s, y) + 0.3 * cross_entropy(o, choice), rel=1e-5)
    np.testing.assert_allclose(model.heads[0].grad.numpy(), 0.7 * (softmax(s) - y) / B, atol=1e-6)
    np.testing.assert_allclose(model.heads[1].grad.numpy(), 0.3 * (softmax(o) - choice) / B, atol=1e-6)
    torch.testing.assert_close(parts["logits"], model.heads[0])


@pytest.mark.parametrize("per_class", [False, True])
def test_the_gradient_of_the_divergence_is_temperature_times_the_difference_of_probabilities(
    drawn: dict[str, Tensor], per_class: bool
) -> None:
    logits, temperature = drawn["student"].float().requires_grad_(), 3.0
    soft_distillation(logits, drawn["teacher"].float(), temperature=temperature, per_class=per_class).backward()
    s, t = drawn["student"].numpy() / temperature, drawn["teacher"].numpy() / temperature
    expected = temperature * (softmax(s) - softmax(t)) / (B * (K if per_class else 1))
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-6)


def test_student_with_its_teachers_logits_has_no_gradient(drawn: dict[str, Tensor]) -> None:
    t = drawn["teacher"].float()
    assert soft_distillation(t, t + 7, temperature=3.0).item() == pytest.approx(
        0, abs=1e-5
    )  # logits count up to a constant


def test_the_binary_loss_takes_every_label_of_a_mixed_image_as_whole(drawn: dict[str, Tensor]) -> None:
    targets = torch.zeros(B, K)
    targets[:, 1], targets[:, 3] = 0.3, 0.7
    s = drawn["student"].numpy()
    p, y = 1 / (1 + np.exp(-s)), (targets.numpy() > 0).astype(float)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert binary_cross_entropy(drawn["student"], targets).item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_give_a_float32_loss(drawn: dict[str, Tensor]) -> None:
    model = Fixed(drawn["student"]).bfloat16()
    for rule in (objective("ce", 0.1), objective("ce", 0.1, distill="soft"), objective("bce", distill="hard")):
        assert rule(model, IMAGES, drawn["targets"].float(), drawn["teacher"].half())["loss"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "weight", "own"),
    [
        ({"distill": "hard"}, 0.5, {}),
        ({"distill": "token"}, 0.5, {}),
        ({"distill": "soft"}, 0.1, {"temperature": 3.0, "per_class": False}),  # arXiv:2012.12877, section 6
        # DeiT's code, its defaults
        ({"distill": "soft", "distill_values": "official"}, 0.5, {"temperature": 1.0, "per_class": True}),
        (
            {"distill": "soft", "distill_weight": 0.9, "distill_temperature": 4.0},
            0.9,
            {"temperature": 4.0, "per_class": False},
        ),
    ],
)
def test_published_values_are_the_defaults(options: dict[str, Any], weight: float, own: dict[str, Any]) -> None:
    rule = objective(**options)
    assert (rule.weight, rule.distillation_options) == (weight, own)


@dataclass(frozen=True, kw_only=True)
class PolyOptions:
    """Options of the polynomial loss."""

    epsilon: float = 1.0
    """Factor of 1 − p."""

    def __post_init__(self) -> None:
        if self.epsilon < -1:
            raise ValueError(f"epsilon {self.epsilon}: expected -1 or more")


def poly(logits: Tensor, targets: Tensor, *, epsilon: float, label_smoothing: float) -> Tensor:
    """Return Poly-1 (Leng et al. 2022, arXiv:2204.12511)."""
    p = (logits.softmax(1) * targets).sum(1)
    return (losses.cross_entropy(logits, targets, label_smoothing=label_smoothing) + epsilon * (1 - p)).mean()


def test_a_new_loss_needs_one_entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Loss(help="Poly-1", function=poly, options=PolyOptions, label_smoothing=True)
    monkeypatch.setitem(LOSSES, "poly", entry)
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "poly: Poly-1" in text
    assert "--poly-epsilon X Loss poly: Factor of 1 − p. [1.0]" in text
    config = Config.build(**parse_arguments(options_parser("train", ""), ["--loss", "poly", "--poly-epsilon", "3"]))
    assert Config.from_dict(config.to_dict()) == config
    rule = create_objective(config.optim)
    equal = Fixed(torch.zeros(B, K))
    targets = torch.eye(K)[torch.arange(B) % K]
    assert rule(equal, IMAGES, targets)["loss"].item() == pytest.approx(np.log(K) + 3 * (1 - 1 / K), rel=1e-5)
    assert apply_regularization(config).optim.label_smoothing == 0.1  # of the preset
    warn_ineffective(Config.build(loss="bce", label_smoothing=0.2))
    assert "--label-smoothing has no effect without --loss ce or focal or poly; remove it" in capsys.readouterr().err
    for value, message in (("-2", "-2.0: expected -1 or more"), ("nan", "nan: expected a finite number")):
        assert main(["train", "--data", "digits", "--loss", "poly", f"--poly-epsilon={value}"]) == 2
        assert capsys.readouterr().err.endswith(f"--poly-epsilon {message}\n")
    other = Config.build(loss_options={"poly_epsilon": 3.0})
    assert losses.create_objective(other.optim).loss is LOSSES["ce"]


FREQUENCIES = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
NAMES = ("a", "b", "c", "d", "e")


def imbalance_objective(**options: Any) -> Objective:
    """Return the loss for data with classes of these frequencies."""
    config = Config.build(**options)
    return create_objective(config.optim, config.distill, NAMES, FREQUENCIES)


def test_class_weights_are_torchs_and_scikit_learns(drawn: dict[str, Tensor], tmp_path: Path) -> None:
    labels = np.repeat(np.arange(K), (FREQUENCIES * 20).int().numpy())
    balanced = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    file = tmp_path / "weights.csv"
    file.write_text("class,weight\n" + "".join(f"{name},{3 * w}\n" for name, w in zip(NAMES, balanced, strict=True)))
    logits = torch.randn(len(labels), K, generator=torch.Generator().manual_seed(1))
    hard, weight = torch.from_numpy(labels), torch.from_numpy(balanced).float()
    mixed, student = drawn["targets"].float(), drawn["student"].float()
    for option in ("balanced", str(file)):  # only the ratios of weights matter
        plain = imbalance_objective(class_weights=option, label_smoothing=0.0)
        np.testing.assert_allclose(plain.class_weights, balanced, rtol=1e-6)
        ours = plain(Fixed(logits), IMAGES, torch.eye(K)[hard])["loss"]
        torch.testing.assert_close(ours, F.cross_entropy(logits, hard, weight))  # over all images, its mean is ours
        smooth = imbalance_objective(class_weights=option, label_smoothing=0.1)
        ours = smooth(Fixed(student), IMAGES, mixed)["loss"]
        torch.testing.assert_close(ours, F.cross_entropy(student, mixed, weight, label_smoothing=0.1))
        views = smooth(Fixed(student.repeat(3, 1)), IMAGES, mixed.repeat(3, 1))["loss"]
        torch.testing.assert_close(views, ours)  # repeated augmentation


def test_the_focal_loss_is_the_papers_equation(drawn: dict[str, Tensor]) -> None:
    s, y, w = drawn["student"].numpy(), drawn["targets"].numpy(), 1 / (K * FREQUENCIES.numpy())
    p, smoothed = softmax(s), 0.9 * y + 0.1 / K
    for weights, gamma in ((np.ones(K), 2.0), (w, 0.5), (w, 0.0)):
        expected = (
            -sum(
                weights[c] * smoothed[i, c] * (1 - p[i, c]) ** gamma * np.log(p[i, c])
                for i in range(B)
                for c in range(K)
            )
            / B
        )
        options = {} if weights is not w else {"class_weights": "balanced"}
        focal = imbalance_objective(loss="focal", loss_options={"focal_gamma": gamma}, label_smoothing=0.1, **options)
        loss = focal(Fixed(drawn["student"]), IMAGES, drawn["targets"].float())["loss"]
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert imbalance_objective(loss="focal").options["gamma"] == 2  # of the paper
    certain = Fixed(torch.eye(K)[:B] * 1000)
    half = imbalance_objective(loss="focal", loss_options={"focal_gamma": 0.5})
    half(certain, IMAGES[:K], torch.eye(K))["loss"].backward()
    assert certain.heads[0].grad.isfinite().all()


def test_losses_of_several_labels_are_the_papers_equations(drawn: dict[str, Tensor]) -> None:
    logits, mixed = drawn["student"].numpy(), drawn["targets"].numpy()
    p, smoothed = 1 / (1 + np.exp(-logits)), 0.9 * mixed + 0.1 / K
    for hard in (mixed > 0.2, mixed, smoothed):  # mixed images have a share of both losses
        y = hard.astype(float)
        bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        q = np.maximum(p - 0.05, 0)
        asymmetric = -(y * (1 - p) ** 1.5 * np.log(p) + (1 - y) * q**4 * np.log(1 - q)).mean()
        own = {"asymmetric_gamma_pos": 1.5}
        smoothing, targets = (0.1, mixed) if hard is smoothed else (0.0, y)
        for name, options, expected in (("bce", {}, bce), ("asymmetric", own, asymmetric)):
            config = OptimConfig(loss=name, loss_options=options, label_smoothing=smoothing)
            objective = create_objective(config, multi_label=True)
            loss = objective(Fixed(drawn["student"]), torch.zeros(B), torch.from_numpy(targets))["loss"]
            assert loss.item() == pytest.approx(expected, rel=1e-5), name
    for options in ({"clip": 0.0}, {"gamma_pos": 0.5, "gamma_neg": 0.5}):  # no gradient is infinite
        extreme = torch.tensor([[-200.0, 200.0, 0.0]] * 2, requires_grad=True)
        loss = losses.asymmetric_loss(
            extreme,
            torch.tensor([[1.0, 0, 0], [0, 1, 1]]),
            **{"gamma_neg": 4.0, "gamma_pos": 0.0, "clip": 0.05} | options,
        )
        loss.backward()
        assert extreme.grad.isfinite().all()
        assert loss.isfinite()
    with pytest.raises(InputError, match=r"--asymmetric-clip 1\.0: expected 0 or more, below 1"):
        create_objective(OptimConfig(loss="asymmetric", loss_options={"asymmetric_clip": 1.0}))


def test_logits_are_adjusted_for_the_labels_and_not_for_the_teacher(drawn: dict[str, Tensor]) -> None:
    s, t, y = (drawn[name].numpy() for name in ("student", "teacher", "targets"))
    expected = cross_entropy(s + 1.5 * np.log(FREQUENCIES.numpy()), y, 0.1)
    model, targets = Fixed(drawn["student"]), drawn["targets"].float()
    alone = imbalance_objective(logit_adjustment=1.5, label_smoothing=0.1)(model, IMAGES, targets)
    assert alone["loss"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(alone["logits"], model.heads[0])
    distilled = imbalance_objective(
        logit_adjustment=1.5, label_smoothing=0.1, teacher="x", distill="soft", distill_temperature=2.0
    )
    loss = distilled(model, IMAGES, targets, drawn["teacher"].float())["loss"]
    assert loss.item() == pytest.approx(0.9 * expected + 0.1 * 4 * kullback_leibler(s, t, 2.0), rel=1e-5)


def test_contradictions_and_bad_files_of_class_weights_get_one_line(tmp_path: Path) -> None:
    twice = "correct the class frequencies twice; give one of them"
    bad = {
        "": "no weight for class 'a'",
        "a,1\nb,2\n": "no weight for class 'c'; add a line for it",
        "a,1\na,2\n": "line 2 is 'a,2': expected each class once",
        "a,0\n": "line 1 is 'a,0': expected each class once, with a weight above 0",
        "a;1\n": "line 1 is 'a;1'",
        "A,1\nb,1\nc,1\nd,1\ne,1\n": "no class 'A' in the data",
    }
    cases: list[tuple[dict[str, Any], str]] = [
        ({"balanced": True, "class_weights": "balanced"}, f"--balanced and --class-weights balanced {twice}"),
        ({"balanced": True, "logit_adjustment": 1.0}, f"--balanced and --logit-adjustment {twice}"),
        (
            {"loss": "bce", "class_weights": "balanced"},
            "--class-weights cannot be combined with --loss bce; use --loss ce",
        ),
        ({"loss": "bce", "logit_adjustment": 1.0}, "--logit-adjustment cannot be combined with --loss bce"),
        ({"class_weights": "nowhere.csv"}, "--class-weights nowhere.csv: No such file or directory; give balanced, or"),
    ]
    for number, (text, message) in enumerate(bad.items()):
        file = tmp_path / f"{number}.csv"
        file.write_text(text)
        cases.append(({"class_weights": str(file)}, message))
    for options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            imbalance_objective(**options)
        assert "\n" not in str(error.value)


def test_unknown_losses_and_options_of_losses_are_input_errors() -> None:
    for options, message in (
        ({"loss": "cee"}, "--loss cee: expected one of .*ce, .*bce"),
        ({"loss": "soft"}, "--loss soft: expected one of "),
        ({"loss_options": {"ce_gamma": 1}}, "unknown option --ce-gamma"),
    ):
        with pytest.raises(InputError, match=message):
            create_objective(Config.build(**options).optim)
    with pytest.raises(InputError, match="--distill ce: expected one of soft, hard, token"):
        objective(distill="ce")
