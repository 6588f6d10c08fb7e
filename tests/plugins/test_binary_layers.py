"""Whole binary layers, their values and all their gradients, against the equations written out in double precision.

An estimator is written as the function whose own derivative it is: `through(value, stand-in)` has the value of the one
and the gradient of the other. Nothing here runs a layer's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.layers import Attention
from torch import Tensor, nn

import smallvit
from smallvit.models.binaryvit import ShortcutAttention
from smallvit.plugins import BinaryConfig
from smallvit.plugins.base import Site
from smallvit.plugins.binary_layers import Binary, BinaryAttending, NormConv2d, RPReLU, ShortcutConv2d, ShortcutLinear
from smallvit.plugins.binary_timm import apply

from .naive import probabilities
from .sweep import each

STEP = 0.15625
BITS = {
    "all": BinaryConfig(step=STEP),
    "weights": BinaryConfig(activations=False, attention=False),
    "activations": BinaryConfig(weights=False, attention=False),
    "attention": BinaryConfig(weights=False, activations=False, step=STEP),
}


# The equations


def through(value: Tensor, stand_in: Tensor) -> Tensor:
    return value.detach() + stand_in - stand_in.detach()


def sign(x: Tensor) -> Tensor:
    """Binarize with the derivative of 2x + x² below 0 and of 2x − x² above, ±1 beyond."""
    near = x.clamp(-1, 1)
    return through(torch.where(x >= 0, 1.0, -1.0), torch.where(x >= 0, 2 * near - near**2, 2 * near + near**2))


def one_bit(weight: Tensor, centered: bool) -> Tensor:
    """Use the clamp, of W - mean W where that is signed, as straight-through estimator; autograd has the rest."""
    rows = []
    for row in weight:
        middle = row - row.mean() if centered else row
        value = row.abs().mean() * torch.where(middle >= 0, 1.0, -1.0).to(row)
        rows.append(through(value, middle.clamp(-1, 1)))
    return torch.stack(rows)


def one_bit_maps(p: Tensor, step: Tensor) -> Tensor:
    """Binarize maps (b, h, n, m), half a step being rounded to 0."""
    steps = (p / step).detach()
    value = step * (steps > 0.5)
    slope = torch.where(steps > 1, 1.0, (steps > 0.5).to(steps) - steps)
    return through(value, p * (steps <= 1) + step * slope)


def bent(x: Tensor, act: RPReLU) -> Tensor:
    """RPReLU of channels on the last axis."""
    moved = x - act.before
    return torch.where(moved > 0, moved, act.slope * moved) + act.after


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """Batch norm of channels on the last axis."""
    rows = x.flatten(0, -2)
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean = rows.mean(0)
        variance = ((rows - mean) ** 2).mean(0)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def operands(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operands of a layer's product: activations (..., c), and weights."""
    if not isinstance(layer, Binary):
        return x, layer.weight
    centered = isinstance(layer, nn.Linear)
    return (
        sign(x + layer.move) if layer.config.activations else x,
        one_bit(layer.weight, centered) if layer.config.weights else layer.weight,
    )


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """(b, n, c) to (b, n, e), with the norm, shortcut and RPReLU that it may have."""
    signed, weight = operands(layer, x)
    y = torch.einsum("bnc,ec->bne", signed, weight)
    y = y if layer.bias is None else y + layer.bias
    if not hasattr(layer, "act"):
        return y
    return bent(normed(y, layer.norm) + residual(x, layer.out_features), layer.act)


def residual(x: Tensor, width: int) -> Tensor:
    own = x.shape[-1]
    if width >= own:
        return torch.stack([x[..., e % own] for e in range(width)], dim=-1) if width % own == 0 else torch.zeros(())
    if own % width:
        return torch.zeros(())
    ratio = own // width
    return torch.stack([x[..., e * ratio : (e + 1) * ratio].sum(-1) / ratio for e in range(width)], dim=-1)


def convolution(x: Tensor, layer: NormConv2d) -> Tensor:
    """Maps (b, c, i, j) to (b, e, k, l), patch by patch."""
    size, stride = layer.kernel_size[0], layer.stride[0]
    signed, weight = operands(layer, x.movedim(1, -1))
    rows = range(0, x.shape[2] - size + 1, stride)
    columns = range(0, x.shape[3] - size + 1, stride)
    patches = [[signed[:, i : i + size, j : j + size] for j in columns] for i in rows]
    y = torch.stack(
        [torch.stack([torch.einsum("bijc,ecij->be", patch, weight) for patch in row], 1) for row in patches], 1
    )
    if not hasattr(layer, "act"):
        return normed(y, layer.norm).movedim(-1, 1)
    means = torch.stack(
        [torch.stack([x[:, :, i : i + size, j : j + size].mean((2, 3)) for j in columns], 1) for i in rows], 1
    )
    return bent(normed(y, layer.norm) + residual(means, layer.out_channels), layer.act).movedim(-1, 1)


def mixed(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | float, bias: Tensor | float = 0.0):
    """Attention of tokens (b, n, c), head by head."""
    bits = isinstance(layer, BinaryAttending)
    if bits:
        q, k, v = (sign(each + move) for each, move in zip((q, k, v), layer.moves.chunk(3), strict=True))
    heads = layer.num_heads
    parts = [torch.stack(each.chunk(heads, dim=-1), dim=1) for each in (q, k, v)]
    scores = torch.einsum("bhnd,bhmd->bhnm", *parts[:2]) * scale + bias
    maps = probabilities(scores, hidden=getattr(layer, "masked", False))
    if bits:
        maps = one_bit_maps(maps, layer.log_step.float().exp().to(maps))  # steps are single-precision numbers
    y = torch.einsum("bhnm,bhmd->bhnd", maps, parts[2])
    return torch.cat([y[:, head] for head in range(heads)], dim=-1)


def attention(x: Tensor, layer: Attention, bias: Tensor | float = 0.0) -> Tensor:
    """timm's."""
    q, k, v = linear(x, layer.qkv).chunk(3, dim=-1)
    heads = layer.num_heads
    if isinstance(layer.q_norm, nn.LayerNorm):
        q, k = (per_head(each, norm, heads) for each, norm in ((q, layer.q_norm), (k, layer.k_norm)))
    scale = (q.shape[-1] // heads) ** -0.5
    if getattr(layer, "temperature", None) is not None:
        scale = layer.temperature.reshape(-1, 1, 1)
    y = mixed(layer, q, k, v, scale, bias)
    if hasattr(layer, "mix_act"):
        y = bent(normed(y, layer.mix_norm) + (q + k + v), layer.mix_act)
    return linear(y, layer.proj)


def per_head(x: Tensor, norm: nn.LayerNorm, heads: int) -> Tensor:
    parts = []
    for part in x.chunk(heads, dim=-1):
        middle = part - part.mean(-1, keepdim=True)
        parts.append(middle / (middle.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias)
    return torch.cat(parts, dim=-1)


def shortcut_attention(x: Tensor, layer: ShortcutAttention, grid: tuple[int, int]) -> Tensor:
    """BinaryViT's, keys and values being those of the means of squares."""
    r, (height, width) = layer.sr_ratio, grid
    prefix = x.shape[1] - height * width
    squares = [(i, j) for i in range(height // r) for j in range(width // r)]
    members = [[prefix + (i * r + y) * width + j * r + z for y in range(r) for z in range(r)] for i, j in squares]
    means = [x[:, own].sum(1) / r**2 for own in members]
    fewer = torch.stack([*x[:, :prefix].unbind(1), *means], dim=1)
    if r > 1:
        fewer = linear(fewer, layer.reduce)
    q, k, v = linear(x, layer.q), linear(fewer, layer.k), linear(fewer, layer.v)
    y = mixed(layer, q, k, v, (q.shape[-1] // layer.num_heads) ** -0.5)
    site = {token: prefix + square for square, own in enumerate(members) for token in own}
    source = [site.get(token, token) for token in range(x.shape[1])]
    return linear(bent(normed(y, layer.mix_norm) + q + (k + v)[:, source], layer.mix_act), layer.proj)


# Layers


@torch.no_grad()
def stirred(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Return the layer in double precision, with no value at its initial one and different steps."""
    generator = torch.Generator().manual_seed(seed)
    layer.double()
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.is_floating_point() and not name.endswith("step"):
            noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(noise + 0.5 if name.endswith("running_var") else value + noise - 0.5)
    return layer


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def agree(
    layer: nn.Module, oracle: Callable[..., Tensor], x: Tensor, *args: object, call: tuple = (), near: float = 1e-8
) -> None:
    """Values, and gradients of the input and of every parameter."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    names, leaves = zip(*layer.named_parameters(), strict=True)
    expected = oracle(inputs[1], layer, *args)
    actual = layer(inputs[0], *(call or args))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    incoming = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2), dtype=actual.dtype)
    sides = (
        torch.autograd.grad(side, [own, *leaves], incoming, allow_unused=True)
        for side, own in ((actual, inputs[0]), (expected, inputs[1]))
    )
    for name, got, expected_values in zip(("input", *names), *sides, strict=True):
        assert (got is None) == (expected_values is None), name
        if got is not None:
            close = 1e-6 if name.endswith("step") else near
            torch.testing.assert_close(
                got, expected_values, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}"
            )


modes = each([True, False], "training")
products = each(["none", "all", "weights", "activations"], "bits")


def product(layer: nn.Module, bits: str, training: bool, shortcut: bool = True) -> nn.Module:
    """Return a linear or convolutional layer with these bits."""
    if bits != "none":
        apply(layer, Site("", layer), replace(BITS[bits], shortcut=shortcut), "paper")
    return stirred(layer).train(training)


def attending(layer: nn.Module, bits: str, training: bool, shortcut: bool = True) -> nn.Module:
    """Return an attention layer that has, with the layers inside it, these bits."""
    if bits != "none":
        smallvit.patch(nn.ModuleDict({"attn": layer}), binary=replace(BITS[bits], shortcut=shortcut))
    return stirred(layer).train(training)


@modes
@products
@each([(6, 6), (4, 12), (12, 4), (4, 6)], "widths")
def test_a_linear_layer_with_a_shortcut(widths: tuple[int, int], bits: str, training: bool) -> None:
    agree(product(ShortcutLinear(*widths), bits, training), linear, random(3, 5, widths[0]))


@modes
@products
@each([(6, 6), (4, 12), (12, 4), (4, 6)], "widths")
def test_a_linear_layer_of_timms_gets_norm_shortcut_and_rprelu(
    widths: tuple[int, int], bits: str, training: bool
) -> None:
    layer = product(nn.Linear(*widths), bits, training)
    assert hasattr(layer, "act") == (bits != "none")
    agree(layer, linear, random(3, 5, widths[0]))


@each([True, False], "bias")
@products
def test_a_linear_layer_that_gets_nothing_but_bits(bits: str, bias: bool) -> None:
    layer = product(nn.Linear(6, 4, bias=bias), bits, True, shortcut=False)
    assert not hasattr(layer, "act")
    agree(layer, linear, random(3, 5, 6))


@modes
@products
@each([(4, 6), (5, 5)], "grid")
def test_a_convolution_with_a_shortcut(grid: tuple[int, int], bits: str, training: bool) -> None:
    agree(product(ShortcutConv2d(3, 6, 2, 2), bits, training), convolution, random(3, 3, *grid))


@modes
@products
@each([True, False], "shortcut")
def test_a_convolution_gets_a_shortcut_with_its_bits_and_has_none_without(
    shortcut: bool, bits: str, training: bool
) -> None:
    layer = product(NormConv2d(3, 6, 2, 2), bits, training, shortcut)
    assert hasattr(layer, "act") == (shortcut and bits != "none")
    agree(layer, convolution, random(3, 3, 4, 6))
    if bits != "none":
        layer.release()
        assert type(layer) is NormConv2d
        assert set(layer.state_dict()) == set(NormConv2d(3, 6, 2, 2).state_dict())
        agree(layer, convolution, random(3, 3, 4, 6))


@each([True, False], "training")
def test_batch_norms_follow_what_they_see_in_training_alone(training: bool) -> None:
    layer = product(ShortcutLinear(4, 4), "all", training)
    x = random(3, 5, 4)
    rows = torch.einsum("bnc,ec->bne", *operands(layer, x)).flatten(0, 1)
    before = layer.norm.running_mean.clone()
    layer(x)
    expected = 0.9 * before + 0.1 * rows.mean(0) if training else before
    torch.testing.assert_close(layer.norm.running_mean, expected)
