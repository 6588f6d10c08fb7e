"""Locality self-attention against an oracle written from the paper's equation."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from smallvit.plugins.lsa import LSAConfig
from smallvit.plugins.lsa_layer import LocalitySelfAttention, diagonal_bias, merge_masks
from smallvit.plugins.sdpa import attend, prefers_fused

from .sweep import each


def locality_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Compose the functions of the layer: attention without the diagonal, scores multiplied by a temperature."""
    bias = diagonal_bias(q.shape[-2], q)
    bias = bias if attn_mask is None else merge_masks(bias, attn_mask)
    return attend(q * temperature.to(q.dtype)[:, None, None], k, v, bias)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(M(q kᵀ t)) v, one query at a time: a token attends to all others, never to itself."""
    b, h, n, _ = q.shape
    rows = []
    for image in range(b):
        for head in range(h):
            for i in range(n):
                others = [j for j in range(n) if j != i and (allowed is None or allowed[i, j])] or [i]
                scores = torch.stack([(q[image, head, i] * k[image, head, j]).sum() for j in others])
                weights = (scores * temperature[head]).exp()
                weights = weights / weights.sum()
                rows.append(sum(weight * v[image, head, j] for weight, j in zip(weights, others, strict=True)))
    return torch.stack(rows).view(b, h, n, -1)


def naive_lsa(x: Tensor, layer: LocalitySelfAttention) -> Tensor:
    b, n, c = x.shape
    qkv = x @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
    q, k, v = qkv.view(b, n, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    y = naive_attention(q, k, v, layer.temperature).permute(0, 2, 1, 3).reshape(b, n, c)
    return y @ layer.proj.weight.T + layer.proj.bias


def layer_and_tokens(n: int, **arguments: object) -> tuple[LocalitySelfAttention, Tensor]:
    torch.manual_seed(0)
    layer = LocalitySelfAttention(12, 3, **arguments)
    nn.init.uniform_(layer.temperature, 0.2, 1.0)
    return layer, torch.randn(2, n, 12)


def adopted(attention: Attention) -> LocalitySelfAttention:
    """Return a patched copy of a timm layer."""
    layer = copy.deepcopy(attention)
    LocalitySelfAttention.adopt(layer, LSAConfig(), gradual=False)
    return layer


# a class token and 2 × 2 patches, two prefix tokens and 2 × 3 patches, no prefix and 3 × 3
@each([5, 8, 9, 2, 1], "n")
@each([False, True], "bias")
def test_lsa_equals_the_equation_forward_and_in_every_gradient(n: int, bias: bool) -> None:
    layer, x = layer_and_tokens(n, qkv_bias=bias)
    inputs = [x.requires_grad_(), *layer.parameters()]
    ours, theirs = layer(x), naive_lsa(x, layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, inputs, upstream)
    for grad, oracle in zip(mine, torch.autograd.grad(theirs, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, oracle, rtol=1e-4, atol=1e-5)


@each([5, 8], "n")
def test_lsa_in_bf16_stays_near_the_equation(n: int) -> None:
    layer, x = layer_and_tokens(n)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), naive_lsa(x, layer), rtol=0.05, atol=0.02)


def test_lsa_drops_attention_in_training_only() -> None:
    layer, x = layer_and_tokens(5, attn_drop=0.5)
    expected = naive_lsa(x, layer)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer.train()(x), expected, atol=1e-3)


@each([torch.float32, torch.bfloat16], "dtype")
def test_attention_dropout_keeps_the_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 4).to(dtype)
    dropped = torch.stack([attend(q, k, v, dropout=0.3) for _ in range(3000)]).float().mean(0)
    torch.testing.assert_close(dropped, attend(q, k, v).float(), rtol=0.1, atol=0.1)


def test_lsa_never_attends_to_itself() -> None:
    """Check that a token's value does not reach its own output: with v the identity, the output is the map."""
    n = 7
    q, k = torch.randn(2, 1, 3, n, 4)
    v = torch.eye(n).expand(1, 3, n, n)
    weights = locality_attention(q, k, v, torch.ones(3))
    assert weights.diagonal(dim1=-2, dim2=-1).eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, n))


def test_lsa_treats_tokens_as_a_set() -> None:
    layer, x = layer_and_tokens(9)
    order = torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-5, atol=1e-5)


def test_lsa_mask_follows_the_number_of_tokens() -> None:
    layer, _ = layer_and_tokens(5)
    for n in (3, 17, 2):
        x = torch.randn(1, n, 12)
        torch.testing.assert_close(layer(x), naive_lsa(x, layer), rtol=1e-5, atol=1e-5)


@each(["bool", "float", "bool 4d"], "form")
@each([torch.float32, torch.bfloat16], "dtype")
def test_lsa_joins_a_callers_mask_and_never_gives_nan(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, 6, 4).to(dtype)
    allowed = torch.rand(6, 6) < 0.6
    allowed[2] = False
    allowed[2, 2] = True  # nothing but itself
    mask = torch.zeros(6, 6).masked_fill(~allowed, -math.inf) if form == "float" else allowed
    mask = mask[None, None] if form == "bool 4d" else mask
    temperature = torch.tensor([0.3, 0.5, 1.0])
    ours = locality_attention(q, k, v, temperature, mask)
    expected = naive_attention(q.float(), k.float(), v.float(), temperature, allowed)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


def test_lsa_is_causal_when_asked() -> None:
    layer, x = layer_and_tokens(6)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(layer(changed, is_causal=True)[:, :4], layer(x, is_causal=True)[:, :4])


@each([False, True], "biased")
def test_both_attention_paths_agree(biased: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 6, 4)
    bias = torch.randn(6, 6) if biased else None
    assert prefers_fused("cpu", torch.float32)
    assert not prefers_fused("cpu", torch.bfloat16)
    low = [tensor.to(torch.bfloat16) for tensor in (q, k, v)]
    exact = attend(*(tensor.float() for tensor in low), bias)
    torch.testing.assert_close(attend(*low, bias).float(), exact, rtol=0.05, atol=0.05)


def test_lsa_without_mask_and_temperature_would_be_timms_attention() -> None:
    """Away from the diagonal LSA starts as the attention it replaces: rescaled rows of the same probabilities."""
    torch.manual_seed(0)
    timm_layer = Attention(12, 3, qkv_bias=True)
    layer = adopted(timm_layer)
    assert layer.temperature.tolist() == pytest.approx([4**-0.5] * 3)
    q, k = torch.randn(2, 1, 3, 5, 4)
    full = (q @ k.transpose(-2, -1) * timm_layer.scale).softmax(-1)
    off = full * (1 - torch.eye(5))
    weights = locality_attention(q, k, torch.eye(5).expand(1, 3, 5, 5), layer.temperature)
    torch.testing.assert_close(weights, off / off.sum(-1, keepdim=True))


@each([{"qk_norm": True}, {"gated": True}, {"scale_norm": True}, {"attn_head_dim": 8}], "extras")
def test_lsa_keeps_what_else_timms_attention_has(extras: dict) -> None:
    """Compare with timm's layer under the mask: with the temperature at timm's scale, nothing else differs."""
    if not extras.keys() <= inspect.signature(Attention).parameters.keys():
        pytest.skip(f"this timm's attention has no {next(iter(extras))}")
    torch.manual_seed(0)
    timm_layer = Attention(12, 3, norm_layer=nn.LayerNorm, **extras).eval()
    x = torch.randn(2, 5, 12)
    mask = ~torch.eye(5, dtype=torch.bool)
    expected = timm_layer(x, attn_mask=mask)  # timm's own layer, the diagonal hidden by its own mask
    layer = adopted(timm_layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lsa_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        LocalitySelfAttention(10, 3)


@each([1.0, 0.7, 0.1, 1e-6, 0.0], "diagonal_weight")
@each([torch.float32, torch.bfloat16], "dtype")
def test_diagonal_weight_scales_self_attention(diagonal_weight: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3)
    LocalitySelfAttention.adopt(layer, LSAConfig(), gradual=True)
    nn.init.uniform_(layer.temperature, 0.3, 1.0)
    layer.diagonal_weight.fill_(diagonal_weight)
    q, k = torch.randn(2, 2, 3, 5, 4).to(dtype)
    weights = torch.einsum("bhid,bhjd->bhij", q.float() * layer.temperature[:, None, None], k.float()).exp()
    weights = weights * (1 - (1 - diagonal_weight) * torch.eye(5))
    ours = layer.attend(q, k, torch.eye(5, dtype=dtype).expand(2, 3, 5, 5))
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours.float(), weights / weights.sum(-1, keepdim=True), rtol=tolerance, atol=tolerance)


def test_layers_and_steps_share_the_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(LocalitySelfAttention(12, 3) for _ in range(3)))
    x = torch.randn(2, 5, 12)
    with torch.inference_mode():  # the mask of an evaluation serves training too
        model.eval()(x)
    assert diagonal_bias(5, x) is diagonal_bias(5, torch.randn(1))
    before = diagonal_bias(5, x).clone()
    model.train()(x).sum().backward()
    assert torch.equal(diagonal_bias(5, x), before)
    assert torch.equal(before, torch.zeros(5, 5).fill_diagonal_(-math.inf))


def test_fusing_drops_a_mask_that_is_phased_in_completely() -> None:
    layer = Attention(12, 3)
    LocalitySelfAttention.adopt(layer, LSAConfig(), gradual=True)
    layer.diagonal_weight.zero_()
    x = torch.randn(2, 5, 12)
    expected = layer.eval()(x)
    layer.fuse()
    assert layer.diagonal_weight is None
    torch.testing.assert_close(layer(x), expected)


def test_diagonal_weight_is_a_buffer() -> None:
    layer = Attention(12, 3)
    LocalitySelfAttention.adopt(layer, LSAConfig(), gradual=True)
    assert "diagonal_weight" in layer.state_dict()
    assert "diagonal_weight" not in dict(layer.named_parameters())
    layer.diagonal_weight.zero_()
    layer(torch.randn(2, 5, 12)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@each(["head", "layer", "fixed"], "temperature")
def test_lsa_alone_has_the_temperatures_that_its_config_says(temperature: str) -> None:
    layer = LocalitySelfAttention(12, 3, config=LSAConfig(temperature=temperature))
    sizes = {"head": 3, "layer": 1, "fixed": 0}
    assert (0 if layer.temperature is None else layer.temperature.numel()) == sizes[temperature]
    q, k = torch.randn(2, 1, 3, 5, 4)
    weights = layer.attend(q, k, torch.eye(5).expand(1, 3, 5, 5))
    torch.testing.assert_close(
        weights, locality_attention(q, k, torch.eye(5).expand(1, 3, 5, 5), torch.full((3,), 0.5))
    )


def test_lsa_refuses_variants_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="temperature 'token': expected one of head, layer, fixed"):
        LSAConfig(temperature="token")
    with pytest.raises(ValueError, match="changes nothing"):
        LSAConfig(temperature="fixed", mask=False)
