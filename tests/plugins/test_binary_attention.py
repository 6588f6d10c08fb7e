"""Binary attention, BinaryViT's and timm's: values and all gradients against the equations."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from torch import nn

from smallvit.models.binaryvit import ShortcutAttention
from smallvit.plugins import LSAConfig
from smallvit.plugins.lsa_layer import LocalitySelfAttention

from .sweep import each
from .test_binary_layers import BITS, STEP, agree, attending, attention, modes, random, shortcut_attention

every = each(["none", *BITS], "bits")


@modes
@every
@pytest.mark.parametrize(
    ("reduction", "prefix"), [(1, 0), (2, 0), (1, 1), (2, 1)], ids=("all", "reduced", "class token", "both")
)
def test_binaryvits_attention(reduction: int, prefix: int, bits: str, training: bool) -> None:
    layer = attending(ShortcutAttention(8, 2, reduction), bits, training)
    agree(layer, shortcut_attention, random(2, prefix + 8, 8), (2, 4))


@modes
@every
@each([False, True], "qk_norm")
@each([True, False], "shortcut")
def test_timms_attention(shortcut: bool, qk_norm: bool, bits: str, training: bool) -> None:
    layer = Attention(8, 2, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    agree(attending(layer, bits, training, shortcut), attention, random(3, 5, 8))


@modes
@each([LSAConfig(), LSAConfig(temperature="fixed"), LSAConfig(mask=False)], "config")
def test_timms_attention_with_a_temperature_and_without_its_diagonal(config: LSAConfig, training: bool) -> None:
    layer = attending(LocalitySelfAttention(8, 2, config=config), "all", training)
    agree(layer, attention, random(3, 5, 8))


def test_a_token_alone_attends_to_itself() -> None:
    layer = attending(LocalitySelfAttention(8, 2), "all", True)
    actual = layer(random(4, 1, 8))
    assert actual.isfinite().all()


@each([False, True], "lsa")
def test_masks_of_callers_hide_tokens(lsa: bool) -> None:
    layer = attending(LocalitySelfAttention(8, 2) if lsa else Attention(8, 2), "all", True)
    seen = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    bias = torch.where(seen, 0.0, -torch.inf)
    agree(layer, attention, random(2, 4, 8), bias, call=(seen,))
    agree(layer, attention, random(2, 4, 8), bias, call=(bias.double(),))
    added = random(4, 4)
    agree(layer, attention, random(2, 4, 8), added, call=(added,))


def test_causal_attention_sees_what_came_before() -> None:
    layer = attending(Attention(8, 2), "all", True)
    past = torch.where(torch.ones(4, 4).tril() > 0, 0.0, -torch.inf)
    agree(layer, attention, random(2, 4, 8), past, call=(None, True))


def test_attention_maps_hold_one_value_at_most() -> None:
    """Values of one and no negative thresholds: what a head gives is its number of tokens seen, times the step."""
    layer = attending(Attention(8, 2), "attention", False, shortcut=False)
    with torch.no_grad():
        layer.moves.zero_()
        layer.moves.chunk(3)[2].fill_(1e6)
    q, k, v = (random(2, 2, 5, 4) for _ in range(3))
    seen = layer.products(q, k, v, 0.5) / STEP  # nearly, as logarithms are rounded
    torch.testing.assert_close(seen, seen.round(), rtol=0, atol=1e-5)
    assert 0 < seen.min().round() <= seen.max().round() <= 5
    assert len(seen.round().unique()) > 1


def test_dropout_acts_on_attention_maps_in_training_alone() -> None:
    layer = attending(Attention(8, 2, attn_drop=0.5), "attention", False, shortcut=False)
    x = random(2, 5, 8)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
