"""Test every adapted attention layer of timm's against an oracle written from its weights and LSA's equation."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

import smallvit.plugins.lsa_timm  # noqa: F401
from smallvit.plugins.lsa import LSAConfig
from smallvit.plugins.lsa_layer import Locality, set_lsa_strength

from . import oracles_maps, oracles_tokens, oracles_windows  # noqa: F401
from .naive import CASES, Case, linear, shift_mask
from .sweep import each, sweep
from .zoo import shaken

SHARED = ("sam", "botnet", "efficientvit", "shvit")
"""Layers without an axis for the heads alone: one temperature serves them all."""
CONFIGS = {
    "paper": LSAConfig(),
    "one temperature": LSAConfig(temperature="layer"),
    "mask only": LSAConfig(temperature="fixed"),
    "temperature only": LSAConfig(mask=False),
}


def timm_layer(case: Case) -> nn.Module:
    torch.manual_seed(0)
    layer = shaken(case.layer())
    layer.eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return layer


def adopted(layer: nn.Module, config: LSAConfig) -> nn.Module:
    layer = copy.deepcopy(layer)
    Locality.adapters[type(layer)].adopt(layer, config, gradual=False)
    return layer


def tokens(case: Case) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(1))


def output(layer: nn.Module, x: Tensor, case: Case) -> Tensor:
    y = layer(x, **case.more)
    return y[0] if isinstance(y, tuple) else y


def test_every_adapter_has_an_oracle() -> None:
    of_timm = {adapted for adapted in Locality.adapters if adapted.__module__.startswith("timm.")}
    assert of_timm == {type(case.layer()) for case in CASES.values()}


@each(CONFIGS, "config")
@sweep(CASES)
def test_lsa_equals_the_equation_forward_and_in_every_gradient(name: str, config: str) -> None:
    case = CASES[name]
    layer = adopted(timm_layer(case), CONFIGS[config])
    if layer.temperature is not None:
        nn.init.uniform_(layer.temperature, 0.3, 1.0)
    x = tokens(case).requires_grad_()
    inputs = [x, *layer.parameters()]
    ours, theirs = output(layer, x, case), case.oracle(layer, x, **case.more)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    mine, expected = (
        torch.autograd.grad(y, inputs, upstream, allow_unused=True, materialize_grads=True) for y in (ours, theirs)
    )
    for grad, oracle in zip(mine, expected, strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-4, atol=1e-5 * (1 + oracle.abs().max().item()))


@pytest.mark.slow
@each([False, True], "gradual")
@sweep(CASES)
def test_every_adapter_compiles_to_one_graph(name: str, gradual: bool) -> None:
    case = CASES[name]
    layer = timm_layer(case)
    try:
        torch.compile(layer, fullgraph=True, backend="eager")(tokens(case), **case.more)
    except Exception:
        pytest.skip("timm's own layer does not compile to one graph")
    Locality.adapters[type(layer)].adopt(layer, LSAConfig(), gradual=gradual)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for diagonal_weight in (1.0, 0.5, 0.0) if gradual else (0.0,):
        set_lsa_strength(layer, 1 - diagonal_weight)
        y = compiled(tokens(case), **case.more)
        y = y[0] if isinstance(y, tuple) else y
        torch.testing.assert_close(y, output(layer, tokens(case), case), rtol=1e-5, atol=1e-5)


@sweep(CASES)
def test_every_head_has_a_temperature_of_its_own_that_begins_at_timms_scale(name: str) -> None:
    layer = timm_layer(CASES[name])
    paper, one = (adopted(layer, CONFIGS[config]).temperature for config in ("paper", "one temperature"))
    if name.startswith("swin v2"):
        assert paper is None
        assert one is None
        return
    heads = (
        1
        if name.startswith(SHARED)
        else 2 * layer.num_heads
        if name.startswith("differential")
        else getattr(layer, "heads", getattr(layer, "num_heads", 1))
    )
    assert paper.shape == (heads,)
    assert one.shape == (1,)
    scale = vars(layer).get("scale", 1.0)
    assert paper.tolist() + one.tolist() == pytest.approx([scale] * (heads + 1))


@sweep(CASES)
@torch.no_grad()
def test_the_temperature_alone_changes_nothing_at_first(name: str) -> None:
    case = CASES[name]
    layer = timm_layer(case)
    ours = output(adopted(layer, LSAConfig(mask=False)), tokens(case), case)
    torch.testing.assert_close(ours, output(layer, tokens(case), case), rtol=1e-5, atol=1e-6)


@sweep(CASES)
@torch.no_grad()
def test_one_temperature_or_none_begins_where_the_papers_form_does(name: str) -> None:
    case = CASES[name]
    layer = timm_layer(case)
    paper, *others = (
        output(adopted(layer, CONFIGS[key]), tokens(case), case) for key in ("paper", "one temperature", "mask only")
    )
    for other in others:
        torch.testing.assert_close(other, paper, rtol=1e-5, atol=1e-6)


SWINS = {
    "swin": lambda window: swin_transformer.WindowAttention(12, 3, window_size=window),
    "swin v2": lambda window: swin_transformer_v2.WindowAttention(12, (window, window), 3),
    "swin v2 cr": lambda window: swin_transformer_v2_cr.WindowMultiHeadAttention(12, 3, (window, window)),
}
every_swin = each(SWINS, "swin")


def swin_layer(swin: str, window: int, config: LSAConfig) -> nn.Module:
    torch.manual_seed(0)
    return adopted(shaken(SWINS[swin](window)).eval(), config)


def own_value(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a token that attends only to itself."""
    bias = layer.qkv.bias[24:] if layer.qkv.bias is not None else layer.v_bias
    return linear(x @ layer.qkv.weight[24:].T + bias, layer.proj)


def test_the_tests_mask_is_timms() -> None:
    for size, window, shift in ((4, 2, 1), (6, 3, 1), (8, 4, 2)):
        block = swin_transformer.SwinTransformerBlock(12, (size, size), 3, window_size=window, shift_size=shift)
        assert torch.equal(block.attn_mask, shift_mask(size, window, shift))


@every_swin
@each([(4, 2, 1), (6, 3, 1), (6, 3, 2)], "size", "window", "shift")
@each(["paper", "one temperature", "mask only"], "config")
def test_shifted_windows_never_look_at_what_is_forbidden_and_at_themselves_only_when_alone(
    swin: str, size: int, window: int, shift: int, config: str
) -> None:
    layer, mask = swin_layer(swin, window, CONFIGS[config]), shift_mask(size, window, shift)
    x = torch.randn(len(mask), window**2, 12)
    y = layer(x, mask)
    others = ~torch.eye(window**2, dtype=torch.bool)
    alone = ((mask < 0) | ~others).all(dim=-1)
    assert alone.any()
    torch.testing.assert_close(y[alone], own_value(layer, x)[alone], rtol=1e-5, atol=1e-5)
    influence = torch.autograd.functional.jacobian(lambda x: layer(x, mask).sum(dim=0), x).abs().amax(dim=(1, 4))
    reach = influence.permute(1, 0, 2) > 1e-9  # of each window's keys on its queries
    assert not (reach & (mask < 0)).any()
    assert (reach == (mask == 0))[others.expand_as(mask)].all()


@every_swin
@each(["paper", "mask only"], "config")
@each([False, True], "gradual")
def test_a_window_of_one_token_passes_it_on(swin: str, config: str, gradual: bool) -> None:
    torch.manual_seed(0)
    layer, x = shaken(SWINS[swin](1)).eval(), torch.randn(4, 1, 12)
    if layer(x).isnan().any():
        pytest.skip(f"this timm's {swin} has no windows of one token")
    Locality.adapters[type(layer)].adopt(layer, CONFIGS[config], gradual)
    if gradual:
        layer.diagonal_weight.zero_()
    torch.testing.assert_close(layer(x), own_value(layer, x), rtol=1e-5, atol=1e-5)


@every_swin
def test_masking_leaves_isolated_tokens_to_themselves(swin: str) -> None:
    torch.manual_seed(0)
    layer, mask = shaken(SWINS[swin](2)).eval(), shift_mask(4, 2, 1)
    Locality.adapters[type(layer)].adopt(layer, LSAConfig(), gradual=True)
    layer.diagonal_weight.zero_()
    x = torch.randn(4, 4, 12)
    torch.testing.assert_close(layer(x, mask)[3], own_value(layer, x)[3], rtol=1e-5, atol=1e-5)
