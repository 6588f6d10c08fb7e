"""Test exclusive self-attention against its equation, alone and with LSA."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins import XSAConfig
from smallvit.plugins.patch import UnsupportedModelError
from smallvit.plugins.xsa_timm import Exclusive, exclude


def reference(attention: nn.Module, x: Tensor, temperature: Tensor, masked: bool) -> Tensor:
    """Compute z = y − (y·v) v / ‖v‖² token by token."""
    b, n, c = x.shape
    heads, width = attention.num_heads, c // attention.num_heads
    qkv = (x @ attention.qkv.weight.T + attention.qkv.bias).view(b, n, 3, heads, width)
    out = torch.zeros(b, n, heads, width)
    for head in range(heads):
        q, k, v = (qkv[:, :, part, head] for part in range(3))
        scores = q @ k.transpose(1, 2) * temperature[head]
        if masked:
            scores = scores.masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
        y = scores.softmax(dim=-1) @ v
        for image in range(b):
            for token in range(n):
                own = v[image, token]
                out[image, token, head] = y[image, token] - (y[image, token] @ own) / (own @ own) * own
    return out.flatten(2) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("lsa", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_the_equation(lsa: bool, fused: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    smallvit.patch(model, xsa=XSAConfig(layers=2), **({"lsa": True} if lsa else {}))
    attention = model.blocks[0].attn
    attention.fused_attn = fused
    temperature = torch.full((3,), 8**-0.5)
    if lsa:
        nn.init.uniform_(attention.temperature, 0.2, 1.0)
        temperature = attention.temperature
    x = torch.randn(2, 6, 24, requires_grad=True)
    actual, expected = attention(x), reference(attention, x, temperature, lsa)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_outputs_are_orthogonal_to_values() -> None:
    y, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    v[0, 0, 0] = 0
    z = exclude(y, v)
    assert (z * v).sum(dim=-1).abs().max() < 1e-5
    assert torch.equal(z[0, 0, 0], y[0, 0, 0])


def test_the_last_layers_are_changed_and_restored() -> None:
    model = smallvit.create_model("vit96+lsa", img_size=32, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    smallvit.patch(model, xsa=XSAConfig(layers=2))
    changed = [isinstance(block.attn, Exclusive) for block in model.blocks]
    assert changed == [False] * 4 + [True] * 2
    after = model(images)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images), after)
    torch.testing.assert_close(copy.deepcopy(model)(images), after)
    assert smallvit.describe(model).added_parameters == len(model.blocks) * 6  # LSA's temperatures
    smallvit.unpatch(model)
    assert not any(isinstance(module, Exclusive) for module in model.modules())


def test_attention_without_values_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="channels before tokens"):
        smallvit.patch(timm.create_model("levit_128s"), xsa=True)
    with pytest.raises(UnsupportedModelError, match="use init='paper'"):
        smallvit.patch(smallvit.create_model("vit96", img_size=32, num_classes=5), init="preserve", xsa=True)
    with pytest.raises(ValueError, match="layers 0"):
        XSAConfig(layers=0)
