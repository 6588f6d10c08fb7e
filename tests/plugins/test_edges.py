"""Patched models in the hands of other tools, and of users who ask for the impossible."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models.swin_transformer import PatchMerging
from torch import nn
from torchvision.models import feature_extraction

import smallvit
from smallvit.plugins import LSAConfig, SPTConfig
from smallvit.plugins.lsa_layer import Locality, LocalitySelfAttention
from smallvit.plugins.patch import UnsupportedModelError
from smallvit.plugins.sdpa import softmax
from smallvit.plugins.spt_layer import ShiftedPatchMerging

from .sweep import each, sweep
from .test_lsa import locality_attention
from .zoo import build, images

INITS = ["paper", "preserve"]


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


@each([-1e4, torch.finfo(torch.float32).min, float("-inf")], "hidden")
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


@each([(torch.float32, 1e-3), (torch.bfloat16, 0.02)], "dtype", "tolerance")
@each([0, 10, 1000], "offset")
def test_merging_does_not_mind_an_offset_of_the_features(dtype: torch.dtype, tolerance: float, offset: float) -> None:
    torch.manual_seed(0)
    layer = ShiftedPatchMerging(24, 48)
    features = torch.randn(1, 8, 8, 24) + offset
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = layer(features)[:, 1:-1, 1:-1].double()
    exact = layer.double()(features.double())[:, 1:-1, 1:-1]
    assert (ours - exact).norm() < tolerance * exact.norm()


@each(INITS, "init")
@each(["vit", "pit", "swin"], "name")
def test_channels_last_models_compute_the_same(name: str, init: str) -> None:
    model = smallvit.patch(build(name), spt=True, lsa=True, init=init)
    expected = model(images(name))
    model.to(memory_format=torch.channels_last)
    ours = model(images(name).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@each(INITS, "init")
@each(["vit", "cait", "swin", "swin v2", "pit"], "name")
def test_timms_feature_extractor_sees_the_patched_model(name: str, init: str) -> None:
    model = smallvit.patch(build(name), spt=True, lsa=True, init=init)
    node = {"swin": "head.fc", "swin v2": "head.fc"}.get(name, "head")
    extractor = create_feature_extractor(model, {node: "logits"})
    torch.testing.assert_close(extractor(images(name))["logits"], model(images(name)), rtol=1e-4, atol=1e-5)


TRACED = ["vit", "vit differential", "deit distilled", "cait", "pit", "swin", "swin v2", "eva-02"]


@pytest.mark.slow
@sweep(TRACED)
def test_torch_fx_traces_patched_models_as_it_does_timms(name: str) -> None:
    """Check that each patched layer is one node."""
    try:
        torch.fx.symbolic_trace(build(name))
    except TypeError:
        pytest.skip("torch.fx cannot trace the unpatched model of this timm release")
    x = images(name)
    for plugins in (("spt",), ("lsa",), ("binary",), ("spt", "lsa")):
        for init in INITS:
            try:
                model = smallvit.patch(build(name), **dict.fromkeys(plugins, True), init=init)
            except UnsupportedModelError:
                continue
            traced = torch.fx.symbolic_trace(model)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
            changed = {change.name for change in smallvit.describe(model).changes}
            assert changed & {node.target for node in traced.graph.nodes}


def test_torchvisions_feature_extractor_returns_the_outputs_of_patched_layers() -> None:
    model, expected = smallvit.patch(build("vit"), spt=True, lsa=True), {}
    nodes = ["patch_embed.proj", "blocks.0.attn", "head"]
    extractor = feature_extraction.create_feature_extractor(model, nodes)
    for node in nodes:
        model.get_submodule(node).register_forward_hook(lambda *given, node=node: expected.update({node: given[-1]}))
    model(images("vit"))
    torch.testing.assert_close(extractor(images("vit")), expected)


def test_a_patched_layer_alone_cannot_be_traced() -> None:
    with pytest.raises(TypeError, match="trace the model that contains it"):
        torch.fx.symbolic_trace(LocalitySelfAttention(12, 3))


@each(INITS, "init")
def test_other_patches_are_refused_while_spt_is_in(init: str) -> None:
    model = smallvit.patch(build("vit"), spt=True, init=init)
    expected = model(images("vit"))
    with pytest.raises(ValueError, match="unpatch the model, change its patch size, patch it again"):
        model.set_input_size(patch_size=8)
    assert torch.equal(model(images("vit")), expected)
    model.set_input_size(img_size=24, patch_size=4)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 5)
    smallvit.unpatch(model).set_input_size(patch_size=8)
    assert model.patch_embed.proj.kernel_size == (8, 8)


@each([{"lsa": {"mask": False}}, {"spt": LSAConfig()}, {"lsa": SPTConfig()}, {"spt": 1}], "wrong")
def test_wrong_config_types_are_refused(wrong: dict[str, Any]) -> None:
    model = build("vit")
    with pytest.raises(TypeError, match="expected True, False or a"):
        smallvit.patch(model, **wrong)
    assert not smallvit.describe(model).changes


def test_a_variant_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="changes nothing in it"):
        smallvit.patch(build("swin v2"), lsa=LSAConfig(mask=False))
    model = smallvit.patch(build("cait"), lsa=LSAConfig(temperature="fixed"))
    for _ in range(2):
        assert [change.name for change in smallvit.describe(model).changes] == ["blocks.0.attn", "blocks.1.attn"]
        smallvit.patch(model, lsa=LSAConfig(temperature="fixed"))


def test_patching_a_merging_itself_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="patch the model that contains it"):
        smallvit.patch(PatchMerging(8), spt=True)
    plain = nn.Sequential()
    plain.original = "timm"
    assert smallvit.unpatch(plain) is plain
    assert not smallvit.describe(plain).changes


def test_shared_layer_is_replaced_at_both_sites() -> None:
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
