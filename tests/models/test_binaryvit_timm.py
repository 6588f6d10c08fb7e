"""Test BinaryViT's sizes and its timm interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor

from smallvit import InputError
from smallvit.models import factory
from smallvit.models.binaryvit import fit_sr_ratio
from smallvit.plugins.resize import set_input_size

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
def test_at_least_four_by_four_keys(img_size: int, side: int, reductions: list[int]) -> None:
    model = tiny(img_size)
    sides = [int(stage.pos_embed.shape[1] ** 0.5) for stage in model.stages]
    assert sides == [side >> number for number in range(4)]
    assert [stage.blocks[0].attn.sr_ratio for stage in model.stages] == reductions
    for rows, factor in zip(sides, reductions, strict=True):
        assert rows // factor >= min(4, rows)


def test_sr_ratios_are_powers_of_two() -> None:
    assert [fit_sr_ratio((side, side), 8) for side in (56, 32, 16, 8, 7, 4, 1)] == [8, 8, 4, 2, 1, 1, 1]


def test_sr_ratios_divide_the_grid() -> None:
    """Otherwise no query would read the remaining rows at the border."""
    for img_size in (28, 30, 36, 44, 52):
        with torch.device("meta"):
            model = tiny(img_size)
        for stage in model.stages:
            assert round(stage.pos_embed.shape[1] ** 0.5) % stage.blocks[0].attn.sr_ratio == 0, img_size


def test_class_token_joins_at_the_last_stage() -> None:
    model = small(avg_pool_head=False)
    seen: list[int] = []
    for stage in model.stages:
        stage.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    tokens = model.forward_features(pixels())
    assert seen == [64, 16, 4, 2]
    assert tokens.shape == (4, 2, 64)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert small().cls_token is None


def test_any_image_shape_and_number_of_channels() -> None:
    for img_size in ((16, 24), (24, 16)):
        assert small(img_size)(torch.randn(2, 3, *img_size)).shape == (2, 5)
    for chans in (1, 2):
        assert tiny(in_chans=chans)(pixels(chans=chans)).shape == (4, 5)


@pytest.mark.parametrize("img_size", [16, 24, (32, 48)])
def test_set_input_size(img_size: int | tuple[int, int]) -> None:
    model = small(32).eval()
    set_input_size(model, img_size)
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    assert model(torch.randn(2, 3, height, width)).isfinite().all()
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [(height >> n) * (width >> n) for n in range(4)]


def test_set_input_size_needs_a_token_in_every_stage() -> None:
    for img_size in (4, 7):
        with pytest.raises(ValueError, match=str(img_size)):
            set_input_size(small(32), img_size)


def test_set_input_size_may_leave_fewer_rows_than_the_sr_ratio() -> None:
    """Set 64 pixels, whose ratios are 8 and 4 in the first two stages."""
    for img_size in (8, 10):
        model = small(64).eval()
        assert model.stages[1].blocks[0].attn.sr_ratio == 4
        set_input_size(model, img_size)
        assert model(pixels(img_size)).isfinite().all()


def test_set_input_size_to_the_same_size_changes_nothing() -> None:
    model = small().eval()
    expected = model(pixels())
    assert torch.equal(set_input_size(model, 8)(pixels()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 4}, "--img-size 4"),
        ({"img_size": 7}, "--img-size 7"),
        ({"img_size": 31}, "--img-size 31"),
        (
            {"img_size": 30, "pyramid": False},
            "--img-size 30: patches of 8 px need a multiple of 8, at least 8; use 24",
        ),
        ({"img_size": 32, "patch_size": 8}, "need a multiple of 8, at least 64; use 64"),
        (
            {"img_size": 32, "patch_size": 32, "pyramid": False},
            "patches of 128 px need a multiple of 128, at least 128",
        ),
    ],
    ids=str,
)
def test_unsuitable_sizes_are_errors_of_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny(**options)
    assert "\n" not in str(caught.value)


# timm interface


def test_no_weight_decay_names_parameters() -> None:
    for options in ({}, {"avg_pool_head": False}, {"pyramid": False, "avg_pool_head": False}):
        model = tiny(**options)
        names = dict(model.named_parameters())
        assert model.no_weight_decay() <= names.keys()
        groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        owners = {name.rpartition(".")[0] for name in names if id(names[name]) in decayed}
        kinds = {type(model.get_submodule(owner)).__name__ for owner in owners}
        assert kinds <= {"BinaryShortcutLinear", "BinaryShortcutConv2d", "Linear", "Conv2d"}


@pytest.mark.parametrize("pyramid", [True, False])
def test_layer_decay_follows_the_blocks(pyramid: bool) -> None:
    """Check the order stem, blocks, head, which timm finds by the model's patterns."""
    model = tiny(pyramid=pyramid, avg_pool_head=False)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    blocks = [own for stage in model.stages for own in stage.blocks]
    block_rates = [rates[id(own.mlp.fc1.weight)] for own in blocks]
    depth = len(blocks)
    stem = rates[id(model.patch_embed.proj.weight)]
    assert [rate / stem for rate in block_rates] == [2.0**n for n in range(1, depth + 1)]
    assert rates[id(model.head.weight)] == 1.0
    assert rates[id(model.norm.weight)] in (0.5, 1.0)
    first = 0
    for stage in model.stages:  # a merging and positions go with the first block behind them
        for own in (stage.pos_embed, *stage.downsample.parameters()):
            assert rates[id(own)] == block_rates[first]
        first += len(stage.blocks)
    assert all(
        {rates[id(p)] for p in own.parameters()} == {rate} for own, rate in zip(blocks, block_rates, strict=True)
    )


def test_feature_info_names_the_stages() -> None:
    model = small()
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, 1), (16, 2), (32, 4), (64, 8)]
    outputs: list[Tensor] = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda *args: outputs.append(args[-1]))
    model(pixels())
    expected = [(4, (8 // info["reduction"]) ** 2, info["num_chs"]) for info in model.feature_info]
    assert [tokens.shape for tokens in outputs] == expected


@pytest.mark.parametrize("avg_pool_head", [True, False])
def test_reset_classifier(avg_pool_head: bool) -> None:
    model = small(avg_pool_head=avg_pool_head).eval()
    assert model.get_classifier() is model.head
    assert factory.classifier_parameter_names(model) == {"head.weight", "head.bias"}
    before = model.forward_head(model.forward_features(pixels()), pre_logits=True)
    model.double().reset_classifier(7)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    assert model(pixels().double()).shape == (4, 7)
    model.float().reset_classifier(0)
    assert torch.equal(model(pixels()), before)
    assert model.num_classes == 0
