"""Test one-bit layers in timm's models: which layers change, what stays, and that they can be taken out again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

import smallvit
from smallvit.plugins import BinaryConfig
from smallvit.plugins.binary_layers import Binary
from smallvit.plugins.binary_timm import BinaryAttention

from .sweep import sweep
from .zoo import build, images

NO_ATTENTION = BinaryConfig(attention=False)
BLOCK = ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
EXPECTED: dict[str, tuple[bool | BinaryConfig, set[str]]] = {
    **{name: (True, {f"blocks.{i}.{each}" for i in range(2) for each in BLOCK}) for name in ("vit", "deit")},
    "deit distilled": (True, {f"blocks.{i}.{each}" for i in range(2) for each in BLOCK}),
    "vit qk-norm": (True, {f"blocks.{i}.{each}" for i in range(2) for each in BLOCK}),
    "pit": (True, {f"transformers.{i}.blocks.0.{each}" for i in range(3) for each in BLOCK}),
    "swin": (
        NO_ATTENTION,
        {f"layers.{i}.blocks.{j}.{each}" for i, j in ((0, 0), (0, 1), (1, 0)) for each in BLOCK[1:]}
        | {"layers.1.downsample.reduction"},
    ),
    "cait": (
        NO_ATTENTION,
        {f"blocks.{i}.{each}" for i in range(2) for each in BLOCK[1:]}
        | {f"blocks_token_only.0.{each}" for each in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")},
    ),
}
families = sweep(EXPECTED, quick=EXPECTED)


def binary(name: str, **more: object) -> nn.Module:
    return smallvit.patch(build(name), binary=EXPECTED[name][0], **more)


def changed(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, Binary)}


def like_new(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Check that a model has the same classes, keys, values and outputs as another one."""
    classes = [{name: type(layer) for name, layer in each.named_modules()} for each in (model, plain)]
    assert classes[0] == classes[1]
    states = model.state_dict(), plain.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(model(x), plain(x))


@families
def test_the_layers_of_blocks_change_and_no_others(name: str) -> None:
    plain, model = dict(build(name).named_modules()), binary(name)
    assert changed(model) == EXPECTED[name][1]
    for own, layer in model.named_modules():
        if own in plain and own not in EXPECTED[name][1]:
            assert type(layer) is type(plain[own])


@families
def test_weights_stay_and_every_parameter_learns(name: str) -> None:
    model, before = binary(name), build(name).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    model.train()(images(name, 4)).square().sum().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


@families
def test_unpatching_gives_back_what_was_there(name: str) -> None:
    model = binary(name)
    assert not torch.equal(model(images(name)), build(name)(images(name)))
    assert smallvit.unpatch(model) is model
    like_new(model, build(name), images(name))


@pytest.mark.slow
@families
def test_patching_twice_changes_nothing(name: str) -> None:
    model = binary(name)
    layers, expected = dict(model.named_modules()), model(images(name))
    smallvit.patch(model, binary=EXPECTED[name][0])
    assert dict(model.named_modules()) == layers
    assert torch.equal(model(images(name)), expected)


@families
def test_copies_pickles_and_state_dicts_hold_all_of_it(name: str) -> None:
    model = binary(name).train()
    model(images(name, 4))  # statistics from its inputs
    expected = model.eval()(images(name))
    assert torch.equal(copy.deepcopy(model)(images(name)), expected)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(images(name)), expected)
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images(name)), expected)
    smallvit.unpatch(twin)
    assert not changed(twin)


@families
def test_patch_keeps_mode_and_dtype(name: str) -> None:
    for training in (True, False):
        model = smallvit.patch(build(name).double().train(training), binary=EXPECTED[name][0])
        assert {layer.training for layer in model.modules()} == {training}
        kinds = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
        assert kinds == {torch.float64}
    assert model(images(name).double()).dtype == torch.float64


@families
def test_describe_counts_what_bits_add(name: str) -> None:
    plain, model = build(name), binary(name)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (plain, model)]
    description = smallvit.describe(model)
    assert description.parameters == sizes[1]
    assert description.added_parameters == sizes[1] - sizes[0]
    assert {change.name for change in description.changes if change.plugin == "binary"} == EXPECTED[name][1]
    assert f"binary  one-bit layers: {len(EXPECTED[name][1])} layers (" in str(description)
    assert "one-bit weights and activations in linear layers" in str(description)
    assert ("one-bit queries, keys, values and attention maps" in str(description)) == (EXPECTED[name][0] is True)


def test_describe_tells_which_half_is_binary() -> None:
    for half in ("weights", "activations"):
        config = BinaryConfig(**{"weights": False, "activations": False, "attention": False} | {half: True})
        text = str(smallvit.describe(smallvit.patch(build("vit"), binary=config)))
        assert f"one-bit {half} in linear layers" in text
        assert "attention maps" not in text


def test_without_shortcuts_layers_get_thresholds_alone() -> None:
    model, plain = smallvit.patch(build("vit"), binary=BinaryConfig(shortcut=False)), build("vit")
    new = {key.rpartition(".")[2] for key in model.state_dict().keys() - plain.state_dict().keys()}
    assert new == {"move", "moves", "log_step"}
    like_new(smallvit.unpatch(model), plain, images("vit"))


def test_mergings_can_stay_in_full_precision() -> None:
    model = smallvit.patch(build("swin"), binary=BinaryConfig(attention=False, downsampling=False))
    assert changed(model) == EXPECTED["swin"][1] - {"layers.1.downsample.reduction"}


def test_attention_alone_can_be_binary() -> None:
    model = smallvit.patch(build("vit"), binary=BinaryConfig(weights=False, activations=False))
    assert changed(model) == {"blocks.0.attn", "blocks.1.attn"}
    assert type(model.blocks[0].attn) is BinaryAttention


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": "blocks.0.*"}, {f"blocks.0.{each}" for each in BLOCK}),
        ({"include": "*.mlp.*"}, {f"blocks.{i}.mlp.{each}" for i in range(2) for each in ("fc1", "fc2")}),
        ({"exclude": ["*.attn", "*.attn.*", "blocks.1.*"]}, {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}),
    ],
    ids=["a block", "all MLPs", "all but"],
)
def test_patterns_choose_the_layers(patterns: dict, expected: set[str]) -> None:
    model = smallvit.patch(build("vit"), binary=True, **patterns)
    assert changed(model) == expected
    assert model.train()(images("vit", 4)).isfinite().all()
    like_new(smallvit.unpatch(model.eval()), build("vit"), images("vit"))


def test_an_attention_layer_can_be_patched_on_its_own() -> None:
    layer = smallvit.patch(Attention(12, 3), binary=True)
    assert type(layer) is BinaryAttention
    assert changed(layer) == {"", "qkv", "proj"}


def test_frozen_and_shared_hooks_stay() -> None:
    model, seen = build("vit"), []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    smallvit.patch(model, binary=True)
    model(images("vit"))
    smallvit.unpatch(model)(images("vit"))
    assert seen == [BinaryAttention, Attention]
