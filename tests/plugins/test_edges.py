"""Patched models in the hands of other tools, and of users who ask for the impossible."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

import smallvit
from smallvit.plugins import LSAConfig, SPTConfig, UnsupportedModelError
from smallvit.plugins.attend import softmax
from smallvit.plugins.locality import Locality, LocalitySelfAttention
from smallvit.plugins.lsa import locality_attention
from smallvit.plugins.spt import ShiftedPatchMerging

from .zoo import build, images

INITS = ["paper", "exact"]


class LowRank(nn.Module):
    """A linear layer with an adapter, which shows the weights of the layer within, as libraries of adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.adapter = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
@pytest.mark.parametrize("layer", ["qkv", "proj", "proj_l"])
def test_adapted_layers_are_called(name: str, layer: str) -> None:
    model = smallvit.patch(build(name), lsa=True)
    attention = next(module for module in model.modules() if isinstance(module, Locality))
    if not hasattr(attention, layer):
        pytest.skip(f"{name} has no {layer}")
    before = model(images(name))
    setattr(attention, layer, LowRank(getattr(attention, layer)))
    after = model(images(name))
    assert not torch.equal(after, before)
    after.sum().backward()
    assert getattr(attention, layer).adapter.weight.grad.any()
    nn.init.zeros_(getattr(attention, layer).adapter.weight)
    torch.testing.assert_close(model(images(name)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
def test_hooks_on_the_layers_within_are_called(name: str) -> None:
    model = smallvit.patch(build(name), lsa=True)
    seen: list[str] = []
    expected = model(images(name))
    for attention in (module for module in model.modules() if isinstance(module, Locality) and hasattr(module, "qkv")):
        attention.qkv.register_forward_hook(lambda *_: seen.append("qkv"))
    torch.testing.assert_close(model(images(name)), expected, rtol=1e-4, atol=1e-5)
    assert seen


def test_the_layer_can_be_derived_from() -> None:
    class Mine(LocalitySelfAttention):
        pass

    assert Mine(12, 3)(torch.randn(1, 4, 12)).shape == (1, 4, 12)
    assert Mine not in Locality.adapters.values()
    model = smallvit.patch(build("vit"), lsa=True)
    nn.utils.parametrize.register_parametrization(model.blocks[0].attn, "temperature", nn.Softplus())
    assert type(smallvit.patch(build("vit"), lsa=True).blocks[0].attn) is LocalitySelfAttention
    smallvit.patch(model, lsa=True)


def test_without_the_fused_kernel_the_layer_computes_the_same_and_calls_its_dropout() -> None:
    model = smallvit.patch(build("vit"), lsa=True)
    expected, maps = model(images("vit")), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *arguments: maps.append(arguments[2]))
    torch.testing.assert_close(model(images("vit")), expected, rtol=1e-4, atol=1e-5)
    assert len(maps) == len(model.blocks)
    assert all(weights.diagonal(dim1=-2, dim2=-1).eq(0).all() for weights in maps)


@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float32).min, float("-inf")])
def test_a_token_whose_mask_hides_all_others_attends_to_itself(hidden: float) -> None:
    mask = torch.zeros(4, 4)
    mask[0, 1:] = hidden
    q, k = torch.randn(2, 1, 3, 4, 8)
    weights = locality_attention(q, k, torch.eye(4).expand(1, 3, 4, 4), torch.ones(3), mask)
    assert weights[:, :, 0, 0].eq(1).all()
    assert weights[:, :, 1:].diagonal(offset=1, dim1=-2, dim2=-1).eq(0).all()


def test_double_precision_is_kept() -> None:
    scores = torch.randn(2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(softmax(scores), scores.softmax(-1), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_merging_does_not_mind_an_offset_of_the_features(dtype: torch.dtype, tolerance: float, offset: float) -> None:
    torch.manual_seed(0)
    layer = ShiftedPatchMerging(24, 48)
    features = torch.randn(1, 8, 8, 24) + offset
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = layer(features)[:, 1:-1, 1:-1].double()
    exact = layer.double()(features.double())[:, 1:-1, 1:-1]
    assert (ours - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["vit", "pit", "swin"])
def test_channels_last_models_compute_the_same(name: str, init: str) -> None:
    model = smallvit.patch(build(name), spt=True, lsa=True, init=init)
    expected = model(images(name))
    model.to(memory_format=torch.channels_last)
    ours = model(images(name).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["vit", "cait", "swin", "swin v2", "pit"])
def test_timms_feature_extractor_sees_the_patched_model(name: str, init: str) -> None:
    model = smallvit.patch(build(name), spt=True, lsa=True, init=init)
    node = {"swin": "head.fc", "swin v2": "head.fc"}.get(name, "head")
    extractor = create_feature_extractor(model, {node: "logits"})
    torch.testing.assert_close(extractor(images(name))["logits"], model(images(name)), rtol=1e-4, atol=1e-5)


def test_a_bare_trace_is_refused_where_it_would_lose_the_mask() -> None:
    with pytest.raises(TypeError, match="create_feature_extractor"):
        torch.fx.symbolic_trace(smallvit.patch(build("swin v2"), lsa=True))


@pytest.mark.parametrize("init", INITS)
def test_other_patches_are_refused_while_spt_is_in(init: str) -> None:
    model = smallvit.patch(build("vit"), spt=True, init=init)
    expected = model(images("vit"))
    with pytest.raises(ValueError, match="unpatch the model, change them, patch it again"):
        model.set_input_size(patch_size=8)
    assert torch.equal(model(images("vit")), expected)
    model.set_input_size(img_size=24, patch_size=4)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 5)
    smallvit.unpatch(model).set_input_size(patch_size=8)
    assert model.patch_embed.proj.kernel_size == (8, 8)


@pytest.mark.parametrize("wrong", [{"lsa": {"mask": False}}, {"spt": LSAConfig()}, {"lsa": SPTConfig()}, {"spt": 1}])
def test_only_bools_and_the_right_configs_are_taken(wrong: dict[str, Any]) -> None:
    model = build("vit")
    with pytest.raises(TypeError, match="expected True, False or a"):
        smallvit.patch(model, **wrong)
    assert not smallvit.describe(model).changes


def test_a_variant_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="leaves nothing of it"):
        smallvit.patch(build("swin v2"), lsa=LSAConfig(mask=False))
    model = smallvit.patch(build("cait"), lsa=LSAConfig(temperature="fixed"))
    for _ in range(2):
        assert [change.name for change in smallvit.describe(model).changes] == ["blocks.0.attn", "blocks.1.attn"]
        smallvit.patch(model, lsa=LSAConfig(temperature="fixed"))


def test_a_merging_on_its_own_is_refused_and_a_plain_module_unpatched() -> None:
    with pytest.raises(UnsupportedModelError, match="the model that it is part of"):
        smallvit.patch(PatchMerging(8), spt=True)
    plain = nn.Sequential()
    plain.original = "timm"
    assert smallvit.unpatch(plain) is plain
    assert not smallvit.describe(plain).changes


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    model = build("swin")
    model.again = model.layers[1].downsample
    smallvit.patch(model, spt=True)
    assert model.again is model.layers[1].downsample
    smallvit.unpatch(model)
    assert model.again is model.layers[1].downsample
    assert type(model.again) is PatchMerging


def test_what_comes_back_is_of_the_dtype_and_as_frozen_as_what_it_replaces() -> None:
    model = smallvit.patch(build("vit"), spt=True).to(torch.bfloat16).requires_grad_(False)
    model.cls_token.data = model.cls_token.data.float()
    smallvit.unpatch(model)
    assert model.patch_embed.proj.weight.dtype == torch.bfloat16
    assert not model.patch_embed.proj.weight.requires_grad


def test_what_never_had_weights_cannot_come_back() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    smallvit.patch(model, spt=True, lsa=True).to_empty(device="cpu")
    with pytest.raises(ValueError, match="before it had weights"):
        smallvit.unpatch(model)
    assert len(smallvit.describe(model).changes) == 13
