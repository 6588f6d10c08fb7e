"""BinaryViT's sizes, and what timm asks of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor

from smallvit import InputError, models
from smallvit.binaryvit import reduction
from smallvit.plugins import set_input_size

from .test_binaryvit import pixels, small, tiny

# Sizes


@pytest.mark.parametrize(
    ("img_size", "side", "reductions"),
    [
        (224, 56, [8, 4, 1, 1]),
        (64, 16, [4, 2, 1, 1]),
        (32, 16, [4, 2, 1, 1]),
        (16, 16, [4, 2, 1, 1]),
        (8, 8, [2, 1, 1, 1]),
    ],
)
def test_keys_are_four_by_four_at_least_where_they_can_be(img_size: int, side: int, reductions: list[int]) -> None:
    model = tiny(img_size)
    sides = [int(stage.pos_embed.shape[1] ** 0.5) for stage in model.stages]
    assert sides == [side >> number for number in range(4)]
    assert [stage.blocks[0].attn.reduction for stage in model.stages] == reductions
    for rows, factor in zip(sides, reductions, strict=True):
        assert rows // factor >= min(4, rows)


def test_reductions_are_powers_of_two() -> None:
    assert [reduction((side, side), 8) for side in (56, 32, 16, 8, 7, 4, 1)] == [8, 8, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("img_size", [28, 30, 36, 44, 52])
def test_every_place_is_among_those_that_keys_are_means_of(img_size: int) -> None:
    """Rows left over at the border would be seen by no query of the layer."""
    model = tiny(img_size)
    for stage in model.stages:
        places, factor = stage.pos_embed.shape[1], stage.blocks[0].attn.reduction
        assert round(places**0.5) % factor == 0


def test_a_class_token_joins_at_the_last_stage() -> None:
    model = small(gap_head=False)
    seen: list[int] = []
    for stage in model.stages:
        stage.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    tokens = model.forward_features(pixels())
    assert seen == [64, 16, 4, 2]
    assert tokens.shape == (4, 2, 64)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert small().cls_token is None


@pytest.mark.parametrize("img_size", [(16, 24), (24, 16)])
def test_images_need_not_be_square(img_size: tuple[int, int]) -> None:
    model = small(img_size)
    assert model(torch.randn(2, 3, *img_size)).shape == (2, 5)


@pytest.mark.parametrize("chans", [1, 2])
def test_any_number_of_channels(chans: int) -> None:
    assert tiny(in_chans=chans)(pixels(chans=chans)).shape == (4, 5)


@pytest.mark.parametrize("img_size", [16, 24, (32, 48)])
def test_other_image_sizes_can_be_set(img_size: int | tuple[int, int]) -> None:
    model = small(32).eval()
    set_input_size(model, img_size)
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    assert model(torch.randn(2, 3, height, width)).isfinite().all()
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [(height >> n) * (width >> n) for n in range(4)]


@pytest.mark.parametrize("img_size", [4, 7])
def test_a_size_without_places_for_every_stage_cannot_be_set(img_size: int) -> None:
    with pytest.raises(ValueError, match=str(img_size)):
        set_input_size(small(32), img_size)


@pytest.mark.parametrize("img_size", [8, 10])
def test_a_size_with_fewer_places_than_are_averaged_can_be_set(img_size: int) -> None:
    """Made for 64 pixels, eight rows are averaged in the first stage and four in the second."""
    model = small(64).eval()
    assert model.stages[1].blocks[0].attn.reduction == 4
    set_input_size(model, img_size)
    assert model(pixels(img_size)).isfinite().all()


def test_setting_the_size_it_has_changes_nothing() -> None:
    model = small().eval()
    expected = model(pixels())
    assert torch.equal(set_input_size(model, 8)(pixels()), expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"img_size": 4}, "--img-size 4"),
        ({"img_size": 7}, "--img-size 7"),
        ({"img_size": 31}, "--img-size 31"),
        ({"img_size": 30, "pyramid": False}, "--img-size 30: --no-pyramid cuts patches of 8 px"),
        ({"img_size": 32, "patch_size": 8}, "--img-size 32: four stages halve it three times; give at least 64"),
        ({"img_size": 32, "patch_size": 32, "pyramid": False}, "--img-size 32: --no-pyramid cuts patches of 128 px"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_told_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        tiny(**options)
    assert "\n" not in str(caught.value)


# What timm asks of a model


def test_names_without_weight_decay_are_names() -> None:
    for options in ({}, {"gap_head": False}, {"pyramid": False, "gap_head": False}):
        model = tiny(**options)
        names = dict(model.named_parameters())
        assert model.no_weight_decay() <= names.keys()
        groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        owners = {name.rpartition(".")[0] for name in names if id(names[name]) in decayed}
        kinds = {type(model.get_submodule(owner)).__name__ for owner in owners}
        assert kinds <= {"BinaryShortcutLinear", "BinaryShortcutConv2d", "Linear", "Conv2d"}


@pytest.mark.parametrize("pyramid", [True, False])
def test_layers_learn_more_slowly_the_deeper_they_lie(pyramid: bool) -> None:
    """timm counts the layers by the model's own patterns: stem, blocks in their order, head."""
    model = tiny(pyramid=pyramid, gap_head=False)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [own for stage in model.stages for own in stage.blocks]
    found = [rates[id(own.mlp.fc1.weight)] for own in blocks]
    depth = len(blocks)
    stem = rates[id(model.patch_embed.proj.weight)]
    assert [rate / stem for rate in found] == [2.0**n for n in range(1, depth + 1)]
    assert rates[id(model.head.weight)] == 1.0
    assert rates[id(model.norm.weight)] in (0.5, 1.0)
    first = 0
    for stage in model.stages:  # a merging and positions go with the first block behind them
        for own in (stage.pos_embed, *stage.downsample.parameters()):
            assert rates[id(own)] == found[first]
        first += len(stage.blocks)
    assert all({rates[id(p)] for p in own.parameters()} == {rate} for own, rate in zip(blocks, found, strict=True))


def test_features_are_told_by_stage() -> None:
    model = small()
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, 1), (16, 2), (32, 4), (64, 8)]
    seen: list[Tensor] = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda *given: seen.append(given[-1]))
    maps = model.forward_intermediates(pixels(), intermediates_only=True)
    for tokens, own, info in zip(seen, maps, model.feature_info, strict=True):
        side = 8 // info["reduction"]
        assert own.shape == (4, info["num_chs"], side, side)
        assert torch.equal(own.flatten(2).mT, tokens)


def test_intermediate_maps_leave_the_class_token_out() -> None:
    model = small(gap_head=False).eval()
    tokens, (last,) = model.forward_intermediates(pixels(), indices=1, norm=True)
    assert torch.equal(tokens, model.forward_features(pixels()))
    assert torch.equal(last[..., 0, 0], tokens[:, 1])


@pytest.mark.parametrize("gap_head", [True, False])
def test_the_head_can_be_exchanged(gap_head: bool) -> None:
    model = small(gap_head=gap_head).eval()
    assert model.get_classifier() is model.head
    assert models.head_names(model) == {"head.weight", "head.bias"}
    before = model.forward_head(model.forward_features(pixels()), pre_logits=True)
    model.double().reset_classifier(7)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    assert model(pixels().double()).shape == (4, 7)
    model.float().reset_classifier(0)
    assert torch.equal(model(pixels()), before)
    assert model.num_classes == 0


def test_activations_computed_again_give_the_same_gradients_and_statistics() -> None:
    one = small().train()
    two = copy.deepcopy(one)
    two.set_grad_checkpointing(True)
    for model in (one, two):
        model(pixels()).square().sum().backward()
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
