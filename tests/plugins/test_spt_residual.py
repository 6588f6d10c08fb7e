"""Shifted views added to trained layers, against an oracle that cuts every view one pixel at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

import smallvit
from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_layer import (
    ShiftedConv2d,
    ShiftedPooling2d,
    ShiftedSwinMerging,
    ShiftedSwinV2CrMerging,
    ShiftedSwinV2Merging,
    ShiftedViews,
)
from smallvit.plugins.spt_timm import with_shifted_views

from .pixels import cut, shifts
from .sweep import each, sweep
from .zoo import build, images, shaken

CONFIGS = {
    "paper": SPTConfig(),
    "cardinal": SPTConfig(directions="cardinal"),
    "all": SPTConfig(directions="all"),
    "a whole patch": SPTConfig(shift=1.0),
}
CENTER = [(0, 0)]


def views_of(layer: ShiftedViews, patch: tuple[int, int]) -> list[tuple[int, int]]:
    return shifts(patch, layer.config.directions, layer.config.shift)


def naive_convolution(layer: ShiftedConv2d, x: Tensor) -> Tensor:
    views = CENTER + views_of(layer, layer.kernel_size)
    patches = cut(x, layer.kernel_size, views, layer.stride, layer.padding)
    kernels = torch.cat([layer.weight[:, None], by_view(layer)], dim=1)
    y = torch.einsum("bijvcpq,evcpq->beij", patches, kernels)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def by_view(layer: nn.Module) -> Tensor:
    return rearrange(layer.shifted, "e (v c) p q -> e v c p q", c=layer.channels[1])


def naive_pooling(layer: ShiftedPooling2d, x: Tensor) -> Tensor:
    own = cut(x, (3, 3), CENTER, (2, 2), (1, 1))[:, :, :, 0]
    own = own.repeat_interleave(layer.out_channels // layer.in_channels, dim=3)
    y = torch.einsum("bijepq,epq->beij", own, layer.weight[:, 0])
    around = cut(x, (2, 2), views_of(layer, (2, 2)), ceil=True)
    return y + layer.bias[:, None, None] + torch.einsum("bijvcpq,evcpq->beij", around, by_view(layer))


def naive_merging(layer: nn.Module, x: Tensor) -> Tensor:
    """Project each view's patch in timm's order (column, row, channel), normalized before or after the projection."""
    patches = cut(x.permute(0, 3, 1, 2), (2, 2), CENTER + views_of(layer, (2, 2)), ceil=True)
    patches = rearrange(patches, "b i j v c p q -> b i j v (q p c)")
    weights = torch.cat([layer.reduction.weight[:, None], rearrange(by_view(layer), "e v c p q -> e v (q p c)")], dim=1)

    def norm(values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)

    if isinstance(layer, ShiftedSwinV2Merging):
        return norm(torch.einsum("bijvn,evn->bije", patches, weights))
    return torch.einsum("bijvn,evn->bije", norm(patches), weights)


EMBEDDINGS: dict[str, tuple[Callable[[], nn.Conv2d], tuple[int, ...]]] = {
    "vit": (lambda: nn.Conv2d(3, 5, 4, 4), (2, 3, 8, 12)),
    "vit, no bias, odd sizes": (lambda: nn.Conv2d(3, 5, 3, 3, bias=False), (2, 3, 10, 11)),
    "pit": (lambda: nn.Conv2d(2, 5, 4, 2), (2, 2, 9, 10)),
    "pvt": (lambda: nn.Conv2d(2, 5, 7, 4, 3), (2, 2, 9, 12)),
    "not square": (lambda: nn.Conv2d(2, 5, (2, 5), (1, 3), (1, 2)), (2, 2, 6, 11)),
    "single pixels": (lambda: nn.Conv2d(4, 5, 1), (2, 4, 3, 4)),
}
POOLINGS: dict[str, tuple[Callable[[], nn.Conv2d], tuple[int, ...]]] = {
    f"{size}, {name}": (layer, (2, 4, *size))
    for size in ((4, 4), (5, 5), (5, 6), (7, 4), (2, 3))
    for name, layer in {
        "twice the channels": lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=4),
        "as many channels": lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=4),
    }.items()
}
MERGINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    f"{name}, {size}": (layer, (2, *size, 3))
    for size in ((4, 6), (5, 6), (5, 7), (1, 3))
    for name, layer in {
        "swin": lambda: swin_transformer.PatchMerging(3),
        "swin v2": lambda: swin_transformer_v2.PatchMerging(3),
        "swin v2 cr": lambda: swin_transformer_v2_cr.PatchMerging(3),
    }.items()
}
ORACLES = {
    ShiftedConv2d: naive_convolution,
    ShiftedPooling2d: naive_pooling,
    ShiftedSwinMerging: naive_merging,
    ShiftedSwinV2Merging: naive_merging,
    ShiftedSwinV2CrMerging: naive_merging,
}
LAYERS = EMBEDDINGS | POOLINGS | MERGINGS


def plain_and_input(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return shaken(make()), torch.randn(shape)


def adopted(layer: nn.Module, config: SPTConfig) -> nn.Module:
    layer = copy.deepcopy(layer)
    with_shifted_views(layer).adopt(layer, config)
    return layer


@each(CONFIGS, "config")
@sweep(LAYERS, quick=LAYERS)
def test_shifted_views_equal_the_equation_forward_and_in_every_gradient(name: str, config: str) -> None:
    plain, x = plain_and_input(name)
    layer = adopted(plain, CONFIGS[config])
    nn.init.normal_(layer.shifted, std=0.3)
    inputs = [x.requires_grad_(), *layer.parameters()]
    ours, theirs = layer(x), ORACLES[type(layer)](layer, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    mine, expected = (torch.autograd.grad(y, inputs, upstream) for y in (ours, theirs))
    for grad, oracle in zip(mine, expected, strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-4, atol=1e-5 * (1 + oracle.abs().max().item()))


@sweep(LAYERS, quick=LAYERS)
def test_shifted_views_change_nothing_at_first_and_learn_at_once(name: str) -> None:
    plain, x = plain_and_input(name)
    layer = adopted(plain, SPTConfig())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    assert not layer.shifted.any()
    layer(x).square().sum().backward()
    assert layer.shifted.grad.any()


@sweep(LAYERS, quick=LAYERS)
def test_release_keeps_learned_weights(name: str) -> None:
    plain, x = plain_and_input(name)
    layer = adopted(plain, SPTConfig())
    learned = {key: torch.randn_like(value) for key, value in plain.state_dict().items()}
    layer.load_state_dict(learned | {"shifted": torch.randn_like(layer.shifted)})
    layer.release()
    assert type(layer) is type(plain)
    assert layer.state_dict().keys() == learned.keys()
    assert all(torch.equal(value, learned[key]) for key, value in layer.state_dict().items())
    plain.load_state_dict(learned)
    assert torch.equal(layer(x), plain(x))
    assert vars(layer).keys() == vars(plain).keys()


@each(["vit", "pit distilled", "swin", "swin v2", "swin v2 cr", "pvt v2"], "name")
@torch.no_grad()
def test_unpatch_keeps_weights_learned_with_preserve(name: str) -> None:
    plain, model = build(name), smallvit.patch(build(name), spt=True, init="preserve")
    learned = {}
    for key, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
        learned[key] = parameter.clone()
    smallvit.unpatch(model)
    names = [key for key, _ in model.named_parameters()]
    assert names == [key for key, _ in plain.named_parameters()]
    assert all(torch.equal(parameter, learned[key]) for key, parameter in model.named_parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images(name)), plain(images(name)))


def test_only_pit_pooling_counts_as_pooling() -> None:
    assert all(with_shifted_views(make()) is ShiftedPooling2d for make, _ in POOLINGS.values())
    assert all(with_shifted_views(make()) is ShiftedConv2d for make, _ in EMBEDDINGS.values())


@pytest.mark.slow
@sweep(LAYERS, quick=LAYERS)
def test_shifted_views_compile_to_one_graph(name: str) -> None:
    plain, x = plain_and_input(name)
    layer = adopted(plain, SPTConfig())
    nn.init.normal_(layer.shifted, std=0.3)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
