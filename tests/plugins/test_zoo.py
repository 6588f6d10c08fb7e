"""Test every supported class and feature of timm's under both plugins: what patching changes, keeps and gives back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit.plugins.lsa_layer import Locality, set_lsa_strength
from smallvit.plugins.patch import UnsupportedModelError, patched_layers, unsupported_reason
from smallvit.plugins.spt_timm import CONVOLUTIONS, MERGINGS

from .sweep import each, sweep
from .zoo import ZOO, build, images

STEM = NO_ATTENTION = "it has no layer of a known kind"
UNSUPPORTED = {
    "spt": {
        **dict.fromkeys(("caformer", "coatnet", "davit", "efficientformer", "efficientformer v2"), STEM),
        **dict.fromkeys(("efficientvit msra", "fastvit", "gcvit", "levit", "levit conv", "maxvit", "nextvit"), STEM),
        **dict.fromkeys(("shvit", "tiny vit", "botnet", "mobilevit", "xcit", "resnet"), STEM),
        **dict.fromkeys(("lowformer", "cpubone", "cpubone, transposed", "gemma4"), STEM),
        "naflexvit": "NaFlexEmbeds (its input is already cut into patches)",
        "tnt": "PixelEmbed (it cuts the output of a convolution into single pixels)",
        "vitamin": "Identity (it takes the features of its backbone unchanged)",
    },
    "lsa": {
        "coat": "FactorAttnConvRelPosEnc (its softmax is over positions for each channel, not between tokens)",
        "mixer": NO_ATTENTION,
        "resnet": NO_ATTENTION,
        "pvt v2 linear": "Attention (its keys are pooled)",
        "xcit": "XCA (it attends among channels, not tokens), ClassAttn (it has one query, the class token)",
    },
}
CASES = [(name, plugin) for name in ZOO for plugin in UNSUPPORTED if name not in UNSUPPORTED[plugin]]
LSA = [name for name, plugin in CASES if plugin == "lsa"]
ALONE = {
    "swin to one token": "layers.2.blocks.0.attn.temperature",
    "efficientvit msra": "stages.2.blocks.0.mixer.m.attn.temperature",
    "levit": "stages.2.blocks.0.attn.temperature",
    "levit conv": "stages.2.blocks.0.attn.temperature",
}
"""Temperatures that do not matter, since the layer sees one token."""

WHERE = {
    "lsa": {
        "cait": "blocks.0.attn blocks.1.attn blocks_token_only.0.attn",
        "crossvit": "blocks.0.blocks.0.0.attn blocks.0.blocks.1.0.attn",
        "gcvit": "stages.0.blocks.0.attn stages.1.blocks.0.attn stages.2.blocks.0.attn stages.3.blocks.0.attn",
        "hiera": "blocks.0.attn blocks.3.attn",
        "hiera det": "blocks.0.attn blocks.2.attn blocks.4.attn",
        "mvit v2": "stages.1.blocks.0.attn stages.2.blocks.1.attn",
        "pvt v2": "stages.3.blocks.0.attn",
        "twins pcpvt": "blocks.3.0.attn",
        "twins svt": "blocks.0.0.attn blocks.1.0.attn blocks.2.0.attn blocks.3.0.attn blocks.3.1.attn",
        "vit attention pool": "blocks.0.attn blocks.1.attn",
        "vit parallel scaling": "blocks.0 blocks.1",
        "volo": "network.2.0.attn network.3.0.attn",
    },
    "spt": {
        "crossvit": "patch_embed.0.proj patch_embed.1.proj",
        "swin": "patch_embed.proj patch_embed.norm layers.1.downsample",
        "vit": "patch_embed.proj",
        "vit hybrid": "patch_embed.proj",
        "volo": "patch_embed.proj",
    },
}
"""Which layers change, in models where some of their kind do not, or there are several."""

UNFOLDED = {
    *("vit qk-norm", "gemma4"),  # all heads share the norm of the queries
    *("vit parallel scaling", "vit differential block", "vit sam", "efficientvit msra", "mvit v2"),
    *("mvit v2, class token", "shvit", "botnet", "lowformer", "cpubone", "cpubone, transposed"),
}
"""Models whose temperatures cannot be multiplied into the queries."""

every_case = sweep(CASES)


def patched(name: str, plugin: str, init: str = "paper", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return smallvit.patch(build(name, seed), **{plugin: True}, init=init)


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    return model(images(name))


@cache
def plain_logits(name: str) -> Tensor:
    return logits(build(name), name)


@cache
def patched_logits(name: str, plugin: str, init: str = "paper") -> Tensor:
    return logits(patched(name, plugin, init), name)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model(images(name)).square().sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@cache
def plain_names(name: str) -> tuple[set[str], set[str]]:
    """Parameters of the plain model, and those that a gradient reaches."""
    model = build(name)
    return {key for key, _ in model.named_parameters()}, set(gradients(model, name))


def changed_classes(plugin: str) -> Iterator[type[nn.Module]]:
    """Return the timm classes that patching the zoo changed."""
    for name, key in CASES:
        if key != plugin:
            continue
        plain, model = build(name), patched(name, plugin)
        for _, layer, _ in patched_layers(model):
            within = plain.get_submodule(layer.rpartition(".")[0])
            yield from (type(plain.get_submodule(layer)), type(within))


@pytest.mark.slow
def test_the_zoo_has_every_attention_class_that_has_an_adapter() -> None:
    of_timm = {adapted for adapted in Locality.adapters if adapted.__module__.startswith("timm.")}
    assert of_timm <= set(changed_classes("lsa"))


@pytest.mark.slow
def test_the_zoo_has_every_embedding_and_merging_that_can_be_shifted() -> None:
    assert CONVOLUTIONS.keys() | MERGINGS.keys() <= set(changed_classes("spt"))


@each(UNSUPPORTED, "plugin")
@sweep(ZOO)
def test_unsupported_models_and_reasons(name: str, plugin: str) -> None:
    model = build(name)
    reason = unsupported_reason(model, plugin)
    if name not in UNSUPPORTED[plugin]:
        assert reason is None
        return
    assert UNSUPPORTED[plugin][name] in reason
    layers, state = dict(model.named_modules()), list(model.state_dict())
    with pytest.raises(UnsupportedModelError) as caught:
        smallvit.patch(model, **{plugin: True})
    assert reason in str(caught.value)
    assert type(model).__name__ in str(caught.value)
    assert dict(model.named_modules()) == layers
    assert list(model.state_dict()) == state
    assert unsupported_reason(model, plugin) == reason


@sweep([(name, plugin) for plugin, names in WHERE.items() for name in names])
def test_only_layers_change_that_can(name: str, plugin: str) -> None:
    changed = [layer for _, layer, _ in patched_layers(patched(name, plugin))]
    assert changed == WHERE[plugin][name].split()


@every_case
def test_patching_changes_the_logits_and_keeps_them_finite(name: str, plugin: str) -> None:
    before, after = plain_logits(name), patched_logits(name, plugin)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4 * before.abs().max()


@every_case
def test_preserve_keeps_the_logits(name: str, plugin: str) -> None:
    assert_near(patched_logits(name, plugin, "preserve"), plain_logits(name))


@every_case
@each(["paper", "preserve"], "init")
def test_gradients_reach_all_that_they_reach_in_the_plain_model_and_all_that_is_new(
    name: str, plugin: str, init: str
) -> None:
    before, reached = plain_names(name)
    model = patched(name, plugin, init)
    ours = gradients(model, name)
    names = {key for key, _ in model.named_parameters()}
    new = names - before
    assert reached & names <= ours.keys()
    assert new <= ours.keys()
    assert all(gradient.isfinite().all() for gradient in ours.values())
    assert {key for key in new if not ours[key].any()} == {ALONE.get(name)} & new


@every_case
@each(["paper", "preserve"], "init")
def test_unpatching_gives_back_the_model_bit_by_bit(name: str, plugin: str, init: str) -> None:
    plain, model = build(name), patched(name, plugin, init)
    with warnings.catch_warnings(record=True, action="always") as caught:
        assert smallvit.unpatch(model) is model
    assert [str(each.message)[:30] for each in caught] == ["unpatching changes the outputs"] * (init == "paper")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [(key, type(layer)) for key, layer in model.named_modules()] == [
        (key, type(layer)) for key, layer in plain.named_modules()
    ]
    assert torch.equal(logits(model, name), plain_logits(name))


@sweep(LSA, quick={"vit", "vit qk-norm", "vit sam", "cait", "pit", "swin", "swin v2", "beit", "maxvit", "levit"})
def test_unpatching_keeps_learned_temperatures_or_says_that_it_cannot(name: str) -> None:
    model = smallvit.patch(build(name), lsa=True, init="preserve")
    learned = [layer.temperature for layer in model.modules() if isinstance(layer, Locality)]
    learned = [temperature for temperature in learned if temperature is not None]
    with torch.no_grad():
        for temperature in learned:
            temperature.mul_(torch.linspace(0.5, 2.5, len(temperature)) if len(temperature) > 1 else 2)
    before = logits(model, name)
    assert not learned or (before - plain_logits(name)).abs().max() > 1e-4
    if name in UNFOLDED:
        with pytest.raises(ValueError, match="loses the learned temperatures, in"):
            smallvit.unpatch(model, strict=True)
        assert torch.equal(logits(model, name), before)
    else:
        assert_near(logits(smallvit.unpatch(model, strict=True), name), before)


@every_case
@each(["paper", "preserve"], "init")
def test_patching_twice_changes_nothing(name: str, plugin: str, init: str) -> None:
    model = patched(name, plugin, init)
    layers, classes = dict(model.named_modules()), [type(layer) for layer in model.modules()]
    state = list(model.state_dict())
    for again in ("paper", "preserve"):
        smallvit.patch(model, **{plugin: True}, init=again)
        assert dict(model.named_modules()) == layers
        assert [type(layer) for layer in model.modules()] == classes
        assert list(model.state_dict()) == state
    assert torch.equal(logits(model, name), patched_logits(name, plugin, init))


@every_case
@each(["paper", "preserve"], "init")
def test_patched_models_survive_pickle_copy_and_state_dict(name: str, plugin: str, init: str) -> None:
    model, expected = patched(name, plugin, init), patched_logits(name, plugin, init)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert torch.equal(logits(twin, name), expected)
    assert torch.equal(logits(smallvit.unpatch(twin), name), plain_logits(name))
    other = patched(name, plugin, init, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, name), expected)


@sweep(LSA)
def test_lsa_strength_interpolates_from_plain_model_to_lsa(name: str) -> None:
    model = patched(name, "lsa", "preserve")
    outputs = {}
    for diagonal_weight in (1.0, 0.999, 0.5, 0.4995, 1e-12, 0.0):
        set_lsa_strength(model, 1 - diagonal_weight)
        outputs[diagonal_weight] = logits(model, name)
    assert_near(outputs[1.0], plain_logits(name))
    assert_near(outputs[0.0], patched_logits(name, "lsa"))
    assert_near(outputs[1e-12], outputs[0.0])
    step = (outputs[1.0] - outputs[0.0]).abs().max().item()
    assert (outputs[0.999] - outputs[1.0]).abs().max() < 0.1 * step
    assert (outputs[0.4995] - outputs[0.5]).abs().max() < 0.1 * step
    assert not torch.allclose(outputs[0.5], outputs[1.0], rtol=0, atol=1e-3 * step)
    assert not torch.allclose(outputs[0.5], outputs[0.0], rtol=0, atol=1e-3 * step)
