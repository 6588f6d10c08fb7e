"""Patching timm models in place."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.optim import param_groups_weight_decay
from torch import nn

import smallvit
from smallvit.plugins import LocalitySelfAttention, ShiftedPatchTokenization, UnsupportedModelError

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit": lambda **k: timm.create_model("vit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "deit": lambda **k: timm.create_model("deit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "distilled": lambda **k: timm.create_model(
        "deit_tiny_distilled_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k
    ),
    "deit3": lambda **k: timm.create_model("deit3_small_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "registers": lambda **k: timm.create_model(
        "vit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4, "reg_tokens": 2, "qk_norm": True} | SMALL | k
    ),
    "average pool": lambda **k: timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 4, "global_pool": "avg", "class_token": False} | SMALL | k,
    ),
}


def images(size: tuple[int, int] = (16, 16), chans: int = 3) -> torch.Tensor:
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_patch_replaces_the_leaves_and_returns_the_model(model: nn.Module) -> None:
    assert smallvit.patch(model, spt=True, lsa=True) is model
    assert type(model.patch_embed) is PatchEmbed
    assert type(model.patch_embed.proj) is ShiftedPatchTokenization
    assert all(type(block.attn) is LocalitySelfAttention for block in model.blocks)
    logits = model(images())
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("plugins", [{"spt": True}, {"lsa": True}, {"spt": True, "lsa": True}], ids=str)
def test_unpatch_restores_the_model_bit_by_bit(model: nn.Module, plugins: dict) -> None:
    before, keys = model(images()), list(model.state_dict())
    smallvit.patch(model, **plugins)
    assert not torch.equal(model(images()), before)
    assert smallvit.unpatch(model) is model
    assert torch.equal(model(images()), before)
    assert list(model.state_dict()) == keys
    assert all(type(block.attn) is Attention for block in model.blocks)


def test_patching_twice_changes_nothing(model: nn.Module) -> None:
    smallvit.patch(model, spt=True, lsa=True)
    layers = dict(model.named_modules())
    expected = model(images())
    smallvit.patch(model, spt=True, lsa=True)
    assert dict(model.named_modules()) == layers
    assert torch.equal(model(images()), expected)


def test_plugins_can_be_added_one_after_the_other(model: nn.Module) -> None:
    smallvit.patch(model, spt=True)
    smallvit.patch(model, lsa=True)
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "lsa"}


def test_patched_models_survive_pickle_copy_and_state_dict(model: nn.Module) -> None:
    smallvit.patch(model, spt=True, lsa=True)
    expected = model(images())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(images()), expected)
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images()), expected)
    smallvit.unpatch(twin)
    assert all(type(block.attn) is Attention for block in twin.blocks)


def test_unpatch_keeps_what_attention_learnt_while_patched() -> None:
    model = smallvit.patch(MODELS["vit"](), lsa=True)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(0.5)
        model.blocks[1].attn.proj = nn.Linear(24, 24, bias=False)  # replaced by the user
    smallvit.unpatch(model)
    assert model.blocks[0].attn.qkv.weight.eq(0.5).all()
    assert model.blocks[1].attn.proj.bias is None


def test_patched_models_move_between_dtypes_and_unpatch_there() -> None:
    model = smallvit.patch(MODELS["vit"](), spt=True, lsa=True).to(torch.float64)
    assert model(images().double()).dtype == torch.float64
    smallvit.unpatch(model)
    assert model(images().double()).dtype == torch.float64


def test_only_new_parameters_get_new_names() -> None:
    model = MODELS["vit"]()
    before = set(model.state_dict())
    after = set(smallvit.patch(model, spt=True, lsa=True).state_dict())
    embedding = {f"patch_embed.proj.{layer}.{kind}" for layer in ("norm", "proj") for kind in ("weight", "bias")}
    assert after - before == embedding | {f"blocks.{i}.attn.temperature" for i in range(2)}


def test_temperatures_have_no_weight_decay() -> None:
    model = smallvit.patch(MODELS["vit"](), spt=True, lsa=True)
    decayed = {id(p) for g in param_groups_weight_decay(model, 0.05) if g["weight_decay"] for p in g["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "patch_embed.proj.proj.weight" in names
    assert not any("temperature" in name or "norm" in name for name in names)


@pytest.mark.parametrize("size", [(16, 24), (8, 16)])
@pytest.mark.parametrize("chans", [1, 3, 5])
def test_non_square_images_and_any_number_of_channels(size: tuple[int, int], chans: int) -> None:
    model = smallvit.patch(MODELS["distilled"](img_size=size, in_chans=chans), spt=True, lsa=True)
    assert model(images(size, chans)).shape == (2, 5)


@pytest.mark.parametrize("patch", [1, 2, 8, 16, (2, 8)])
def test_any_patch_size(patch: int | tuple[int, int]) -> None:
    model = smallvit.patch(MODELS["vit"](patch_size=patch), spt=True, lsa=True)
    assert model(images()).isfinite().all()


def test_dynamic_image_sizes_still_work() -> None:
    model = smallvit.patch(MODELS["vit"](dynamic_img_size=True), spt=True, lsa=True)
    assert model(images((24, 32))).shape == (2, 5)


def test_patched_models_compile_to_one_graph() -> None:
    model = smallvit.patch(MODELS["distilled"]().eval(), spt=True, lsa=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_describe_tells_what_changed_where_and_at_what_cost() -> None:
    model = MODELS["vit"]()
    plain = sum(parameter.numel() for parameter in model.parameters())
    smallvit.patch(model, spt=True, lsa=True)
    description = smallvit.describe(model)
    assert [change.name for change in description.changes] == ["patch_embed.proj", "blocks.0.attn", "blocks.1.attn"]
    assert description.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert description.added_parameters == description.parameters - plain == 4 * 48 * 24 + 2 * 5 * 48 + 2 * 3
    text = str(description)
    assert "patch_embed.proj" in text
    assert "8x8 pixels instead of 4x4" in text
    assert f"{plain:,} without plugins" in text
    assert "lsa  locality self-attention: not patched" in str(smallvit.describe(smallvit.unpatch(model)))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_other_models_are_refused_and_told_what_is_supported(name: str) -> None:
    model = timm.create_model(name)
    layers = dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match="VisionTransformer"):
        smallvit.patch(model, spt=True)
    assert dict(model.named_modules()) == layers


def test_a_vit_without_a_known_attention_is_left_unchanged() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, attn_layer="diff", **SMALL)
    layers = dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match="locality self-attention"):
        smallvit.patch(model, spt=True, lsa=True)
    assert dict(model.named_modules()) == layers


def test_patch_wants_to_know_what_to_patch() -> None:
    with pytest.raises(ValueError, match="spt=True"):
        smallvit.patch(MODELS["vit"]())
