"""Test one-bit layers with the other plugins, what they refuse, and how patched models run."""

from __future__ import annotations

import pickle

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import smallvit
from smallvit.plugins import BinaryConfig, LSAConfig, SPTConfig
from smallvit.plugins.binary_timm import BinaryLocalitySelfAttention
from smallvit.plugins.patch import UnsupportedModelError

from .sweep import each, sweep
from .test_binary_patch import EXPECTED, NO_ATTENTION, binary, changed, like_new
from .zoo import ZOO, build, images

# With the other plugins


def test_all_plugins_together_and_apart_again() -> None:
    plain = build("vit")
    model = smallvit.patch(build("vit"), spt=True, lsa=True, binary=True)
    assert all(type(block.attn) is BinaryLocalitySelfAttention for block in model.blocks)
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "lsa", "binary"}
    model.train()(images("vit", 4)).square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    model.eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(images("vit")), model(images("vit")))
    smallvit.unpatch(model)
    for own, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            pytest.fail(f"{own} is left")
    like_new(model, plain, images("vit"))


@pytest.mark.parametrize(
    "plugins", [{"lsa": True}, {"spt": True}, {"spt": True, "lsa": LSAConfig(mask=False)}], ids=str
)
def test_describe_counts_what_plugins_add_together(plugins: dict) -> None:
    model, plain = smallvit.patch(build("vit"), binary=True, **plugins), build("vit")
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (plain, model)]
    assert smallvit.describe(model).added_parameters == sizes[1] - sizes[0]


def test_lsa_before_bits_is_lsa_with_bits() -> None:
    one = smallvit.patch(build("vit"), lsa=True, binary=True)
    two = smallvit.patch(smallvit.patch(build("vit"), lsa=True), binary=True)
    assert torch.equal(one(images("vit")), two(images("vit")))


def test_lsa_after_binary_is_refused() -> None:
    model = binary("vit")
    before = model(images("vit"))
    with pytest.raises(UnsupportedModelError, match="no layer is left for it after binary"):
        smallvit.patch(model, lsa=True)
    assert torch.equal(model(images("vit")), before)


def test_lsa_joins_bits_that_leave_attention_alone() -> None:
    one = smallvit.patch(build("swin"), lsa=True, binary=NO_ATTENTION)
    two = smallvit.patch(smallvit.patch(build("swin"), binary=NO_ATTENTION), lsa=True)
    assert torch.equal(one(images("swin")), two(images("swin")))
    like_new(smallvit.unpatch(two), build("swin"), images("swin"))


@each(["vit", "swin"], "name")
def test_binary_with_preserving_plugins(name: str) -> None:
    model = smallvit.patch(build(name), spt=SPTConfig(), lsa=True, binary=EXPECTED[name][0], init="preserve")
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "lsa", "binary"}
    assert model(images(name)).isfinite().all()
    like_new(smallvit.unpatch(model), build(name), images(name))


def test_spt_after_bits_leaves_none_of_them_behind() -> None:
    model = smallvit.patch(binary("swin"), spt=True)
    like_new(smallvit.unpatch(model), build("swin"), images("swin"))


def test_a_swin_with_spt_has_nothing_to_merge_by_bits() -> None:
    model = smallvit.patch(build("swin"), spt=True, binary=NO_ATTENTION)
    assert changed(model) == EXPECTED["swin"][1] - {"layers.1.downsample.reduction"}


# What cannot be


@each(["swin", "cait", "beit"], "name")
@pytest.mark.parametrize(
    "config", [BinaryConfig(), BinaryConfig(weights=False, activations=False)], ids=("all", "maps")
)
def test_maps_without_a_binary_form_are_refused_in_one_line(name: str, config: BinaryConfig) -> None:
    model = build(name)
    with pytest.raises(UnsupportedModelError, match=r"its maps have no one-bit form") as caught:
        smallvit.patch(model, binary=config)
    assert "\n" not in str(caught.value)
    assert not changed(model)


def test_models_without_attention_are_refused() -> None:
    for name in ("mixer", "resnet"):
        with pytest.raises(UnsupportedModelError, match="no layer of a known kind"):
            smallvit.patch(build(name), binary=True)


def test_something_else_than_a_configuration_is_refused() -> None:
    with pytest.raises(TypeError, match="BinaryConfig"):
        smallvit.patch(build("vit"), binary="yes")


@sweep([name for name in ZOO if name not in EXPECTED])
def test_bits_reach_every_layer_that_is_said_to_have_them(name: str) -> None:
    """Layers whose weights are used by other code than their own would stay unchanged, and learn nothing."""
    model = build(name)
    try:
        smallvit.patch(model, binary=NO_ATTENTION)
    except UnsupportedModelError:
        assert not changed(model)
        return
    called: set[str] = set()
    for own in changed(model):
        model.get_submodule(own).register_forward_hook(lambda *_, own=own: called.add(own))
    with torch.no_grad():
        model(images(name))
    assert called == changed(model)


# Running


def test_thresholds_steps_and_slopes_have_no_weight_decay() -> None:
    model = smallvit.patch(build("vit"), lsa=True, binary=True)
    decayed = {
        id(p) for group in param_groups_weight_decay(model, 0.05) if group["weight_decay"] for p in group["params"]
    }
    names = {key for key, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "blocks.0.attn.qkv.weight" in names
    assert not {key.rpartition(".")[2] for key in names} & {"move", "moves", "log_step", "before", "slope", "after"}


@each(["vit", "swin"], "name")
def test_bfloat16_runs_forwards_and_backwards(name: str) -> None:
    model = binary(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(name, 4))
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
    assert binary(name).bfloat16()(images(name).bfloat16()).isfinite().all()


@pytest.mark.slow
def test_a_patched_model_compiles_to_one_graph_with_its_gradients() -> None:
    models = [smallvit.patch(build("vit"), lsa=True, binary=True).train() for _ in range(2)]
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    actual = [each(images("vit", 4)) for each in (models[0], compiled)]
    torch.testing.assert_close(*actual, rtol=1e-4, atol=1e-5)
    for logits in actual:
        logits.square().sum().backward()
    for (key, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
