"""Define the losses of training: cross-entropies of labels, and distillation from a teacher's logits or feature maps.

Distillation is DeiT's (Touvron et al. 2021, arXiv:2012.12877). With labels y, student logits s, teacher logits t,
weight λ and temperature τ:

    soft     (1 − λ) L(s, y) + λ τ² KL(softmax(t/τ) ‖ softmax(s/τ))
    hard     (1 − λ) L(s, y) + λ CE(s, argmax t)
    token    as hard, but the second term takes the logits of the distillation head
    features L(s, y) + λ Σ mean((up(F) − up(A f))²), feature maps F of the teacher and f of the student (`teacher`)

L is the loss of the labels. A model with two heads gives both logits; the first term takes the class head's.

Labels are distributions y, smoothed or mixed, and the classes have weights w and frequencies π in the batches:

    cross-entropy    L = −Σ_c w_c y_c log p_c, with p = softmax(s + τ log π)
    focal            L = −Σ_c w_c y_c (1 − p_c)^γ log p_c

With several labels an image, y is 0 or 1 for each class (or between), p_c = sigmoid(s_c), and L is a mean over classes:

    binary cross-entropy  L = −Σ_c y_c log p_c + (1 − y_c) log(1 − p_c)
    asymmetric            L = −Σ_c y_c (1 − p_c)^γ₊ log p_c + (1 − y_c) q_c^γ₋ log(1 − q_c), with q = max(p − m, 0)

Weights are scaled to a mean of 1 over the images of an epoch, and L is the mean over a batch, so that neither the size
of the gradients nor the teacher's share depends on the weights' scale or on the classes in a batch. The term τ log π is
logit adjustment (Menon et al. 2020, arXiv:2007.07314); the teacher's term takes the logits s without it.
torch is imported inside functions, so that the command line lists losses and their options without it.

Axes: b batch, k classes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smallvit.config.options import DistillConfig, OptimConfig
from smallvit.utils.errors import InputError, flag, require, suggest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "b k"],
    targets: Float[Tensor, "b k"],
    *,
    label_smoothing: float = 0.0,
    weight: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy against smoothed label distributions, with weights of the classes."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), targets, weight, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class FocalOptions:
    """Options of the focal loss."""

    gamma: float = 2.0
    """Exponent of the factor (1 − p) that reduces the loss of images classified well; 0 gives cross-entropy."""

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma {self.gamma}: expected 0 or more")


def focal_loss(
    logits: Float[Tensor, "b k"],
    targets: Float[Tensor, "b k"],
    *,
    gamma: float,
    label_smoothing: float = 0.0,
    weight: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """Return the focal loss of softmax probabilities against smoothed label distributions.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5, with a softmax and a weight α for each class.
    """
    targets = smooth(targets, label_smoothing)
    log_p = logits.float().log_softmax(dim=1)
    weighted = targets if weight is None else targets * weight
    factor = (1 - log_p.exp()).clamp(min=1e-6) ** gamma  # at 0 the gradient is infinite if γ < 1
    return -(weighted * factor * log_p).sum(dim=1).mean()


def binary_cross_entropy(
    logits: Float[Tensor, "b k"],
    targets: Float[Tensor, "b k"],
    *,
    multi_label: bool = False,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean of one binary cross-entropy per class.

    Both labels of a mixed image count fully; with several labels an image, they have their shares and are smoothed.

    Source: DeiT III (Touvron et al. 2022, arXiv:2204.07118).
    """
    import torch.nn.functional as F

    targets = smooth(targets, label_smoothing) if multi_label else targets.gt(0).float()
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


@dataclass(frozen=True, kw_only=True)
class AsymmetricOptions:
    """Options of the asymmetric loss."""

    gamma_neg: float = 4.0
    """Exponent of the factor p that reduces the loss of absent classes that are recognized as such."""
    gamma_pos: float = 0.0
    """Exponent of the factor (1 − p) that reduces the loss of present classes that are recognized."""
    clip: float = 0.05
    """Margin by which the probabilities of absent classes are reduced; lower ones have no loss."""

    def __post_init__(self) -> None:
        for name in ("gamma_neg", "gamma_pos"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.clip < 1:
            raise ValueError(f"clip {self.clip}: expected 0 or more, below 1")


def asymmetric_loss(
    logits: Float[Tensor, "b k"],
    targets: Float[Tensor, "b k"],
    *,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    multi_label: bool = True,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean over classes of the asymmetric loss, in which easy absent classes count little.

    In timm, versions differ in their mean, and mixed targets have other weights.

    Source: Ridnik et al. 2020, arXiv:2009.14119, with the recommended exponents.
    """
    import torch.nn.functional as F

    logits, targets = logits.float(), smooth(targets, label_smoothing)
    absent = (-logits).sigmoid()
    shifted = (absent + clip).clamp(1e-8, 1)
    positive = absent.clamp(min=1e-6) ** gamma_pos * F.logsigmoid(logits)  # at 0 the gradient is infinite if γ < 1
    negative = (1 - shifted).clamp(min=1e-6) ** gamma_neg * shifted.log()
    return -(targets * positive + (1 - targets) * negative).mean()


def smooth(targets: Float[Tensor, "b k"], amount: float) -> Float[Tensor, "b k"]:
    """Return targets mixed with the uniform distribution."""
    return (1 - amount) * targets + amount / targets.shape[1]


def soft_distillation(
    logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    *,
    temperature: float = 1.0,
    per_class: bool = False,
) -> Float[Tensor, ""]:
    """Return τ² KL(softmax(t/τ) ‖ softmax(s/τ)), the mean over images.

    Args:
        temperature: τ.
        per_class: Divide by the number of classes too, as DeiT's code does.
    """
    import torch.nn.functional as F

    student, teacher = ((each.float() / temperature).log_softmax(dim=1) for each in (logits, teacher_logits))
    total = F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
    return total / (logits.numel() if per_class else len(logits))


def hard_distillation(logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Return the cross-entropy against the class that the teacher predicts."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))


def feature_guidance(
    maps: Sequence[Float[Tensor, "b d i j"]], teacher_maps: Sequence[Float[Tensor, "b d k l"]]
) -> Float[Tensor, ""]:
    """Return the sum over stages of the mean squared difference of two feature maps, at the larger of their grids.

    Source: locality guidance (Li et al. 2022, arXiv:2207.10026).
    """
    import torch
    import torch.nn.functional as F

    total = torch.zeros((), device=maps[0].device)
    for student, teacher in zip(maps, teacher_maps, strict=True):
        grid = tuple(max(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
        student, teacher = (F.interpolate(each.float(), grid, mode="bilinear") for each in (student, teacher))
        total = total + F.mse_loss(student, teacher)
    return total


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An entry of `LOSSES`: all that training and the command line need to know about a loss."""

    help: str
    function: Callable[..., Tensor]
    """Function of logits (b, k), targets (b, k) and the options; returns the mean over the batch. Targets are label
    distributions, or the teacher's logits; with `features`, both are lists of feature maps."""
    options: type | None = None
    """Frozen dataclass of the loss's own options; its fields become flags, --<loss>-<field>. A ValueError of its
    `__post_init__` that opens with a field, as `gamma -1.0: expected 0 or more`, is shown as an error of the flag."""
    label_smoothing: bool = False
    """Whether the function takes `label_smoothing` and smooths the targets itself."""
    multi_label: bool = False
    """Whether the function takes targets of images with several labels, with `multi_label` and `label_smoothing`."""
    softmax: bool = False
    """Whether it is a loss of softmax probabilities that takes `weight`, one for each class."""
    distillation: bool = False
    """Whether the targets are a teacher's outputs; chosen by --distill instead of --loss."""
    features: bool = False
    """Whether the function compares feature maps; it is added to the labels' loss, which keeps its weight."""
    weight: float = 0.5
    """Default weight λ of a distillation loss."""


LOSSES: dict[str, Loss] = {
    "ce": Loss(
        help="cross-entropy",
        function=cross_entropy,
        label_smoothing=True,
        softmax=True,
    ),
    "bce": Loss(
        help="one binary cross-entropy per class; the default with several labels an image",
        function=binary_cross_entropy,
        multi_label=True,
    ),
    "asymmetric": Loss(
        help="as bce, with less weight on absent classes that are recognized as such; for several labels an image",
        function=asymmetric_loss,
        options=AsymmetricOptions,
        multi_label=True,
    ),
    "focal": Loss(
        help="cross-entropy with less weight on images that are classified well",
        function=focal_loss,
        options=FocalOptions,
        label_smoothing=True,
        softmax=True,
    ),
    "soft": Loss(
        help="the teacher's probabilities",
        function=soft_distillation,
        distillation=True,
    ),
    "hard": Loss(
        help="the class that the teacher predicts",
        function=hard_distillation,
        distillation=True,
    ),
    "token": Loss(
        help="the class that the teacher predicts, by a distillation token with its own head",
        function=hard_distillation,
        distillation=True,
    ),
    "features": Loss(
        help="the teacher's feature maps: locality guidance by a CNN",
        function=feature_guidance,
        distillation=True,
        features=True,
        weight=2.5,
    ),
}
"""All losses by name: values of --loss, and of --distill for those with a teacher."""


@dataclass(frozen=True)
class Objective:
    """The loss of a run: a loss of the labels, and one of the teacher's outputs if there is a teacher."""

    loss: Loss
    options: Mapping[str, Any] = field(default_factory=dict)
    distillation: Loss | None = None
    distillation_options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 0.0
    """Weight λ of the teacher's term."""
    adjustment: Float[Tensor, " k"] | None = None
    """Logit adjustment τ log π of the labels' term."""

    @property
    def class_weights(self) -> list[float] | None:
        """Weights of the classes in the labels' term."""
        return self.options["weight"].tolist() if "weight" in self.options else None

    def begin_step(self, share: float) -> None:
        """Do nothing: the loss is the same in all steps."""

    def end_step(self) -> None:
        """Do nothing: the loss has no state."""

    def __call__(
        self,
        model: Callable[..., Any],
        images: Float[Tensor, "b c h w"],
        targets: Float[Tensor, "b k"],
        teacher_outputs: Float[Tensor, "b k"] | Sequence[Float[Tensor, "b d i j"]] | None = None,
    ) -> dict[str, Tensor]:
        """Return loss and logits of the class head for a batch, in float32.

        Args:
            teacher_outputs: The teacher's logits, or its feature maps if the distillation loss compares those.
        """
        outputs = model(images)
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        adjusted = logits if self.adjustment is None else logits.float() + self.adjustment
        loss = self.loss.function(adjusted, targets, **self.options)
        if self.distillation is not None:
            term = self.distillation.function(distilled, teacher_outputs, **self.distillation_options)
            label_weight = 1.0 if self.distillation.features else 1 - self.weight
            loss = label_weight * loss + self.weight * term
        return {"loss": loss, "logits": logits}


def create_objective(
    optim: OptimConfig,
    distill: DistillConfig | None = None,
    class_names: Sequence[str] = (),
    frequencies: Float[Tensor, " k"] | None = None,
    *,
    multi_label: bool = False,
) -> Objective:
    """Return the loss that the options describe.

    Args:
        class_names: Names of the classes.
        frequencies: Share of each class in the batches; without it, the loss ignores them.
        multi_label: Whether images have several labels.

    Raises:
        InputError: no such loss, an option that it does not accept, or an unusable file of class weights.
    """
    loss = get_loss(optim.loss, distillation=False)
    options = _own_options(optim.loss, optim.loss_options)
    for name in ("class_weights", "logit_adjustment"):
        if getattr(optim, name) and not loss.softmax:
            able = " or ".join(name for name, each in LOSSES.items() if each.softmax)
            raise InputError(f"{flag(name)} cannot be combined with --loss {optim.loss}; use --loss {able}")
    if multi_label:
        options["multi_label"] = True
    if loss.label_smoothing or multi_label:
        options["label_smoothing"] = optim.label_smoothing or 0.0
    adjustment = None
    if frequencies is not None:
        if optim.class_weights:
            options["weight"] = class_weights(optim.class_weights, class_names, frequencies)
        if optim.logit_adjustment:
            adjustment = optim.logit_adjustment * frequencies.log()
    if distill is None or distill.teacher is None:
        return Objective(loss, options, adjustment=adjustment)
    term, extra = get_loss(distill.distill, distillation=True), _own_options(distill.distill, optim.loss_options)
    weight = term.weight
    if distill.distill == "soft":
        per_class = distill.distill_values == "official"
        weight, temperature = (0.5, 1.0) if per_class else (0.1, 3.0)
        extra |= {"temperature": distill.distill_temperature or temperature, "per_class": per_class}
    return Objective(loss, options, term, extra, distill.distill_weight or weight, adjustment)


def class_weights(option: str, class_names: Sequence[str], frequencies: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the weight of each class, scaled to a mean of 1 over images with these frequencies of the classes.

    Args:
        option: balanced, which gives n / (k n_c) as scikit-learn does, or a CSV file.

    Raises:
        InputError: The file cannot be read, or does not hold one positive weight for each class.
    """
    import torch

    if option == "balanced":
        return 1 / (len(frequencies) * frequencies)
    given = read_class_weights(option)
    for name in given:
        if name not in class_names:
            raise InputError(f"--class-weights {option}: no class {name!r} in the data{suggest(name, class_names)}")
    if missing := [name for name in class_names if name not in given]:
        raise InputError(f"--class-weights {option}: no weight for class {missing[0]!r}; add a line for it")
    weight = torch.tensor([given[name] for name in class_names], device=frequencies.device)
    return weight / (weight * frequencies).sum()


def read_class_weights(path: str) -> dict[str, float]:
    """Return the weights in a CSV file by class.

    Raises:
        InputError: It cannot be read, or a line is not a class, once, and a positive number.
    """
    weights: dict[str, float] = {}
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"--class-weights {path}: {why}; give balanced, or a CSV file class,weight") from None
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and [cell.strip() for cell in row] == ["class", "weight"]):
            continue
        try:
            name, weight = row[0], float(row[1])
        except (IndexError, ValueError):
            name, weight = "", math.nan
        if len(row) != 2 or not 0 < weight < math.inf or name in weights:
            raise InputError(
                f"--class-weights {path}: line {number} is {','.join(row)!r}: expected each class once, with a "
                "weight above 0: class,weight"
            )
        weights[name] = weight
    return weights


def get_loss(name: str, *, distillation: bool) -> Loss:
    """Return the loss of this name.

    Raises:
        InputError: no such loss.
    """
    names = [each for each, loss in LOSSES.items() if loss.distillation == distillation]
    if name not in names:
        option = "distill" if distillation else "loss"
        raise InputError(f"{flag(option)} {name}: expected one of {', '.join(names)}{suggest(name, names)}")
    return LOSSES[name]


def loss_option_names() -> dict[str, str]:
    """Return the options of all losses, `<loss>_<field>`, with the loss of each."""
    return {
        f"{name}_{each.name}": name for name, loss in LOSSES.items() if loss.options for each in fields(loss.options)
    }


def _own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loss's own options, by field, with the defaults of those not given.

    Raises:
        InputError: an unknown option, or a value that the loss refuses by a ValueError that opens with the field.
    """
    known = loss_option_names()
    for option in options:
        if option not in known:
            raise InputError(f"unknown option {flag(option)} of a loss{suggest(option, known)}")
    if LOSSES[name].options is None:
        return {}
    own = {option.removeprefix(f"{name}_"): value for option, value in options.items() if known[option] == name}
    for option, value in own.items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name}_{option}", value, "a finite number")
    try:
        return asdict(LOSSES[name].options(**own))
    except ValueError as error:
        raise InputError(f"{flag(name)}-{error}") from None
