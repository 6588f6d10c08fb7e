"""Test estimators of one-bit layers: values and gradients against ones by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

import smallvit
from smallvit.plugins import BinaryConfig
from smallvit.plugins.binary_layers import (
    BinaryConv2d,
    BinaryLinear,
    RPReLU,
    binary_probabilities,
    binary_sign,
    binary_weight,
    shortcut,
    signs,
)

from .sweep import each


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Activations


@each([torch.float64, torch.float32, torch.bfloat16, torch.float16], "dtype")
def test_signs_are_plus_or_minus_one_and_zero_is_positive(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0, torch.inf, -torch.inf], dtype=dtype)
    tiny = -1.0 if x[1] < 0 else 1.0  # float16 has no number as small
    actual = binary_sign(x)
    assert actual.dtype == dtype
    assert actual.tolist() == [-1, tiny, 1, 1, 1, 1, 1, -1]


def test_numbers_too_small_to_be_halved_keep_their_sign() -> None:
    least = torch.tensor([5e-324, -5e-324], dtype=torch.float64)
    assert binary_sign(least).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("x", "slope"),
    [(-1.5, 0.0), (-1.0, 0.0), (-0.75, 0.5), (-0.0, 2.0), (0.0, 2.0), (0.25, 1.5), (1.0, 0.0), (1.5, 0.0)],
)
def test_the_gradient_of_a_sign_is_a_triangle(x: float, slope: float) -> None:
    value = torch.tensor([x], requires_grad=True)
    (3 * binary_sign(value)).backward()
    assert value.grad.item() == 3 * slope


def test_a_second_gradient_of_a_sign_is_refused_and_not_wrong() -> None:
    value = torch.tensor([0.25], requires_grad=True)
    (first,) = torch.autograd.grad(binary_sign(value), value, create_graph=True)
    with pytest.raises(RuntimeError):
        first.backward()


# Weights


def test_rows_of_a_linear_layer_have_their_own_scale_and_middle() -> None:
    weight = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 1.0], [-0.5, -0.5, -0.5], [0.0, 0.0, 0.0]])
    expected = torch.tensor(  # means 3, 0, -0.5, 0; means of absolute values 3, 2/3, 0.5, 0
        [[-3.0, -3.0, 3.0], [-2 / 3, 2 / 3, 2 / 3], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(binary_weight(weight, centered=True), expected)


def test_channels_of_a_convolution_have_a_scale_and_no_middle() -> None:
    weight = torch.tensor([1.0, 2.0, 0.0, -5.0, -1.0, -1.0, -1.0, -1.0]).reshape(2, 1, 2, 2)
    expected = torch.tensor([2.0, 2.0, 2.0, -2.0, -1.0, -1.0, -1.0, -1.0]).reshape(2, 1, 2, 2)
    assert torch.equal(binary_weight(weight, centered=False), expected)


@each([(5, 7), (4, 3, 2, 2), (1, 1)], "shape")
@each([True, False], "centered")
def test_binary_weights_are_signs_times_scales(shape: tuple[int, ...], centered: bool) -> None:
    weight = random(*shape)
    actual = binary_weight(weight, centered=centered)
    for row, own in zip(actual, weight, strict=True):
        middle = own.mean() if centered else 0.0
        scale = own.abs().mean()
        assert set(row.flatten().tolist()) <= {scale.item(), -scale.item()}
        assert torch.equal(row > 0, own - middle >= 0)
    sign, scale = signs(weight, centered=centered)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert set(sign.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(sign * scale, actual)


def test_a_weights_gradient_passes_near_the_middle_and_through_the_middle() -> None:
    """Check a row of mean 2 with distances 0.5, 1, 1.25 on both sides: two are clipped, the bound itself is not.

    The clipped gradient is 1, 2, 3, 6, 0, 0, of mean 2; subtracting the weights' mean subtracts it.
    """
    weight = torch.tensor([[1.5, 2.5, 1.0, 3.0, 0.75, 3.25]], requires_grad=True)
    incoming = torch.tensor([[1.0, 2.0, 3.0, 6.0, 5.0, 6.0]])
    binary_weight(weight, centered=True).backward(incoming)
    assert weight.grad.tolist() == [[-1.0, 0.0, 1.0, 4.0, -2.0, -2.0]]


@each([True, False], "centered")
def test_a_weights_gradient_is_that_of_the_composed_expression(centered: bool) -> None:
    """Written as the official code composes it: constants for the signs and scales, autograd for the clamp."""
    mine, theirs = (random(5, 9).mul(0.8).requires_grad_() for _ in range(2))
    incoming = random(5, 9, seed=1)
    binary_weight(mine, centered=centered).backward(incoming)
    middle = theirs - theirs.mean(dim=-1, keepdim=True) if centered else theirs
    clipped = middle.clamp(-1, 1)
    assert (clipped != middle).any()
    scaled = theirs.abs().mean(dim=1, keepdim=True) * middle.sign()
    (scaled.detach() - clipped.detach() + clipped).backward(incoming)
    torch.testing.assert_close(mine.grad, theirs.grad)
    if centered:
        torch.testing.assert_close(mine.grad.sum(dim=1), torch.zeros(5, dtype=torch.float64))


def test_without_a_middle_the_gradient_is_cut_off_by_the_weight_itself() -> None:
    weight = torch.tensor([0.5, -1.0, 1.0, -1.25]).reshape(1, 1, 2, 2).requires_grad_()
    binary_weight(weight, centered=False).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2))
    assert weight.grad.flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


# A layer


def test_thresholds_move_the_sign_and_learn_what_activations_would() -> None:
    layer = nn.Linear(3, 2, bias=False)
    BinaryLinear.adopt(layer, BinaryConfig(weights=False))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]))
        layer.move.copy_(torch.tensor([0.5, -0.5, 0.0]))
    x = torch.tensor([[-0.25, 0.25, 0.75], [-2.0, 1.0, -0.5]], requires_grad=True)
    y = layer(x)  # signs of [0.25, -0.25, 0.75] and [-1.5, 0.5, -0.5]
    assert y.tolist() == [[91.0, 182.0], [-91.0, -182.0]]
    y.sum().backward()
    slopes = torch.tensor([[1.5, 1.5, 0.5], [0.0, 1.0, 1.0]]) * torch.tensor([3.0, 30.0, 300.0])
    assert torch.equal(x.grad, slopes)
    assert torch.equal(layer.move.grad, slopes.sum(0))
    assert layer.weight.grad.tolist() == [[0.0, 0.0, 0.0]] * 2  # signs +-, -+, +- of two rows


def test_thresholds_of_a_convolution_are_those_of_its_channels() -> None:
    layer = nn.Conv2d(2, 1, 2, 2, bias=False)
    BinaryConv2d.adopt(layer, BinaryConfig(weights=False))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.move.copy_(torch.tensor([1.0, -1.0]))
    y = layer(torch.full((1, 2, 2, 2), 0.5))
    assert y.item() == 4 - 4
    y.backward()
    assert layer.move.grad.tolist() == [0.0, 4.0]  # at 1.5 and -0.5, four sites each


@each([(True, True), (True, False), (False, True)], "weights", "activations")
def test_each_half_can_be_left_in_full_precision(weights: bool, activations: bool) -> None:
    layer = nn.Linear(6, 4).double()
    expected = [random(5, 6), layer.weight.detach()]
    if activations:
        expected[0] = expected[0].sign()
    if weights:
        expected[1] = binary_weight(expected[1], centered=True)
    BinaryLinear.adopt(layer, BinaryConfig(weights=weights, activations=activations))
    torch.testing.assert_close(layer(random(5, 6)), expected[0] @ expected[1].T + layer.bias)
    assert (layer.move is None) == (not activations)


# Attention maps


@pytest.mark.parametrize(
    ("p", "bit", "slope", "of_step"),  # p in steps, what it becomes, d/dp, d/dα
    [
        (0.0, 0, 1, 0.0),
        (0.25, 0, 1, -0.25),
        (0.5, 0, 1, -0.5),  # half a step: to the even 0
        (0.75, 1, 1, 0.25),
        (1.0, 1, 1, 0.0),
        (1.25, 1, 0, 1.0),
        (1.5, 1, 0, 1.0),
        (4.0, 1, 0, 1.0),
    ],
)
@each([0.25, 2**-7], "step")
def test_attention_is_one_step_or_none(p: float, bit: int, slope: float, of_step: float, step: float) -> None:
    maps = torch.full((1, 1, 1, 1), p * step, requires_grad=True)
    alpha = torch.tensor(step, requires_grad=True)
    actual = binary_probabilities(maps, alpha)
    assert actual.item() == bit * step
    (5 * actual).sum().backward()
    assert maps.grad.item() == 5 * slope
    assert alpha.grad.item() == 5 * of_step
    assert alpha.grad.shape == ()


def test_the_steps_gradient_is_a_sum_over_the_batch() -> None:
    """Check two images, two heads, two queries and three keys, without the factor that LSQ adds."""
    maps = random(2, 2, 2, 3).softmax(-1)
    step = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    incoming = random(2, 2, 2, 3, seed=1)
    binary_probabilities(maps, step).backward(incoming)
    total = 0.0
    for value, gradient in zip(maps.flatten().tolist(), incoming.flatten().tolist(), strict=True):
        steps = value / 0.25
        total += gradient * (1.0 if steps > 1 else round(steps) - steps)
    assert step.grad.item() == pytest.approx(total, rel=1e-12)


def test_cutting_a_batch_in_two_does_not_change_the_steps_gradient() -> None:
    maps, step = random(4, 2, 3, 3).softmax(-1), torch.tensor(0.125, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(binary_probabilities(maps, step).square().sum(), step)
    parts = [torch.autograd.grad(binary_probabilities(half, step).square().sum(), step)[0] for half in maps.chunk(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_learned_step_stays_positive() -> None:
    """Check that the step, stored as its logarithm, has an attention map and a gradient at any value."""
    layer = smallvit.patch(nn.ModuleDict({"attn": Attention(8, 2)}), binary=BinaryConfig(step=0.03))["attn"]
    assert layer.log_step.exp().item() == pytest.approx(0.03)
    with torch.no_grad():
        layer.log_step.fill_(-20.0)
    q, k, v = (random(2, 2, 5, 4, seed=seed).float() for seed in range(3))
    actual = layer.products(q, k, v, 0.5)
    assert actual.isfinite().all()
    assert actual.any()
    actual.square().sum().backward()
    assert layer.log_step.grad.isfinite()
    assert layer.log_step.grad > 0  # a smaller loss lies at a smaller step


# RPReLU and shortcuts


def rprelu(x: Tensor, before: Tensor, slope: Tensor, after: Tensor) -> Tensor:
    """torch's, in one line."""
    shape = (-1, *[1] * (x.ndim - 2))
    return F.prelu(x - before.view(shape), slope) + after.view(shape)


@each([(6, 4), (2, 4, 3, 5)], "shape")
def test_rprelu_is_torchs_prelu_moved_twice(shape: tuple[int, ...]) -> None:
    layer = RPReLU(4).double()
    values = [random(4, seed=seed) for seed in (1, 2, 3)]
    x = random(*shape)
    x[0] = values[0].view(-1, *[1] * (len(shape) - 2))  # at the bend
    leaves = [each.clone().requires_grad_() for each in (x, *values)]
    expected = rprelu(*leaves)
    incoming = random(*shape, seed=4)
    gradients = torch.autograd.grad(expected, leaves, incoming)
    with torch.no_grad():
        for parameter, value in zip((layer.before, layer.slope, layer.after), values, strict=True):
            parameter.copy_(value)
    mine = x.clone().requires_grad_()
    actual = layer(mine)
    actual.backward(incoming)
    torch.testing.assert_close(actual, expected)
    for got, expected_values in zip(
        (mine.grad, layer.before.grad, layer.slope.grad, layer.after.grad), gradients, strict=True
    ):
        torch.testing.assert_close(got, expected_values)


@each([(5, 3), (2, 3, 2, 2)], "shape")
def test_rprelus_gradients_are_numerical_ones(shape: tuple[int, ...]) -> None:
    layer = RPReLU(3).double()
    parameters = [random(3, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    names = ("before", "slope", "after")

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (random(*shape).requires_grad_(), *parameters))


def test_rprelu_begins_as_a_leaky_relu() -> None:
    torch.testing.assert_close(RPReLU(2)(torch.tensor([[-4.0, 4.0]])), torch.tensor([[-1.0, 4.0]]))


def test_shortcut_widths() -> None:
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    assert shortcut(x, 8).tolist() == [[1, 3, 5, 7, 1, 3, 5, 7]]
    assert torch.equal(shortcut(x, 4), x)
    assert shortcut(x, 2).tolist() == [[2, 6]]
    assert shortcut(x, 1).tolist() == [[4]]
    assert shortcut(x, 6) is None
    assert shortcut(x, 3) is None


# Configurations


@each([0.0, -0.1, float("nan")], "step")
def test_a_step_is_a_number_above_zero(step: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        BinaryConfig(step=step)
