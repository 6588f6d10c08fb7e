"""Test options of a plain ViT against equations written out and timm's own models."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import DropPath

import smallvit
from smallvit.config.options import OptimConfig
from smallvit.export.timm_folder import is_timm_model
from smallvit.models.factory import create_model
from smallvit.training.launch import inherit_from_init
from smallvit.training.optim import create_optimizer
from smallvit.training.setup import create_setup
from smallvit.utils.errors import InputError

ALL = {"global_pool": "avg", "pos_embed": "sincos", "init_values": 0.1, "linear_drop_path": True}


def model(arch: str = "vit96", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(arch, img_size=32, num_classes=10, **options).eval()


@pytest.mark.parametrize("arch", ["vit", "vit96", "vit_tiny_patch16_224"])
def test_the_head_reads_the_mean_of_the_patches_and_nothing_else(arch: str) -> None:
    pooled, images = model(arch, global_pool="avg"), torch.randn(2, 3, 32, 32)
    tokens = pooled.patch_embed(images) + pooled.pos_embed
    assert tokens.shape[1] == pooled.patch_embed.num_patches
    for block in pooled.blocks:
        tokens = block(tokens)
    mean = sum(tokens[:, n] for n in range(tokens.shape[1])) / tokens.shape[1]
    torch.testing.assert_close(pooled(images), pooled.head(pooled.fc_norm(mean)))


@pytest.mark.parametrize("arch", ["vit96", "vit_tiny_patch16_224"])
def test_positions_are_sines_and_cosines_of_row_and_column(arch: str) -> None:
    fixed = model(arch, pos_embed="sincos")
    rows, columns = fixed.patch_embed.grid_size
    quarter = fixed.embed_dim // 4
    assert fixed.pos_embed[0, 0].eq(0).all(), "the class token has no place"
    for row, column, k in ((0, 0, 0), (1, 2, 0), (rows - 1, 0, quarter - 1), (rows - 1, columns - 1, quarter // 2)):
        site = fixed.pos_embed[0, 1 + row * columns + column]
        angle = [each / 10_000 ** (k / quarter) for each in (row, column)]
        expected_values = [f(a) for a in angle for f in (math.sin, math.cos)]
        actual = [site[part * quarter + k].item() for part in range(4)]
        assert sorted(actual) == pytest.approx(sorted(expected_values), abs=1e-5)


def test_sincos_pos_embed_is_not_trained() -> None:
    fixed = model(pos_embed="sincos").train()
    before = fixed.pos_embed.detach().clone()
    optimizer = create_optimizer(fixed, OptimConfig(lr=0.1, weight_decay=0.5, weight_decay_all=True))
    fixed(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(fixed.pos_embed, before)


def test_layer_scale_multiplies_every_branch() -> None:
    scaled, plain, images = model(init_values=0.25), model(), torch.randn(2, 3, 32, 32)
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"blocks.{n}.ls{k}.gamma" for n in range(6) for k in (1, 2)]
    tokens = plain._pos_embed(plain.patch_embed(images))
    for block in plain.blocks:
        tokens = tokens + 0.25 * block.attn(block.norm1(tokens))
        tokens = tokens + 0.25 * block.mlp(block.norm2(tokens))
    torch.testing.assert_close(scaled(images), plain.head(plain.norm(tokens[:, 0])))


def test_timm_models_have_linear_drop_path() -> None:
    own, asked = (model("vit_tiny_patch16_224", linear_drop_path=rising) for rising in (False, True))
    rates = [[block.drop_path1.drop_prob for block in each.blocks[1:]] for each in (own, asked)]
    assert rates[0] == pytest.approx(rates[1])


def test_linear_drop_path() -> None:
    rates = [layer.drop_prob for layer in model(linear_drop_path=True).modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.1 * block / 5 for block in range(6) for _ in range(2)])


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("swin", {"pos_embed": "sincos"}, "--pos-embed: --arch swin is no plain ViT"),
        ("resnet20", {"global_pool": "avg"}, "--global-pool: --arch resnet20 is no plain ViT"),
        ("deit3_small_patch16_224", {"init_values": 0.1}, None),  # timm's plain ViT
        ("deit_tiny_distilled_patch16_224", {"global_pool": "avg"}, "--global-pool: --arch deit_tiny_distilled"),
        ("vit96", {"global_pool": "avg", "dist_token": True}, "it has no class token"),
        (
            "vit_small_patch16_18x2_224",
            {"init_values": 0.1},
            "--init-values: the blocks of this model have no LayerScale",
        ),
    ],
)
def test_vit_options_are_refused_by_other_architectures(arch: str, options: dict, message: str | None) -> None:
    if message is None:
        assert create_model(arch, img_size=32, num_classes=3, **options).blocks[0].ls1.gamma[0].item() == pytest.approx(
            0.1
        )
        return
    with pytest.raises(InputError) as caught:
        create_model(arch, img_size=32, num_classes=3, **options)
    assert message in str(caught.value)


def test_init_values_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"--init-values 0\.0: expected above 0"):
        smallvit.Config.build(init_values=0.0)


def test_a_run_with_all_of_them_and_both_plugins_is_rebuilt_from_its_file(tmp_path) -> None:
    config = smallvit.Config.build(spt=True, lsa=True, epochs=1, train_fraction=0.1, out=str(tmp_path / "run"), **ALL)
    smallvit.train(config)
    loaded = smallvit.load_model(tmp_path / "run")
    assert loaded.cls_token is None
    assert not loaded.pos_embed.requires_grad
    assert [type(layer).__name__ for layer in (loaded.blocks[0].ls1, loaded.fc_norm)] == ["LayerScale", "LayerNorm"]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a ViT with fixed positions and rising stochastic depth at 8 pixels."""
    out = str(tmp_path_factory.mktemp("runs") / "varied")
    smallvit.train(
        smallvit.Config.build(epochs=1, train_fraction=0.1, out=out, pos_embed="sincos", linear_drop_path=True)
    )
    return out


def test_linear_drop_path_is_not_inherited_from_init(varied: str) -> None:
    begun = [
        inherit_from_init(smallvit.Config.build(init=varied, linear_drop_path=rising)).model for rising in (False, True)
    ]
    assert [(each.linear_drop_path, each.pos_embed) for each in begun] == [(False, "sincos"), (True, "sincos")]


def test_sincos_pos_embed_is_recomputed_for_another_image_size(varied: str) -> None:
    resized = create_setup(smallvit.Config.build(init=varied, img_size=12)).model
    fresh = create_model("vit96", img_size=12, in_chans=1, num_classes=10, pos_embed="sincos")
    torch.testing.assert_close(resized.pos_embed.cpu(), fresh.pos_embed)
    assert not resized.pos_embed.requires_grad


def test_timm_alone_does_not_build_them() -> None:
    spec = {"arch": "vit_tiny_patch16_224", "img_size": 32}
    assert is_timm_model(spec)
    assert not any(is_timm_model(spec | {name: value}) for name, value in ALL.items())


def test_weight_decay_acts_on_all_only_where_asked() -> None:
    def decayed(**options: bool) -> int:
        groups = create_optimizer(model("vit96+lsa"), OptimConfig(weight_decay=0.05, **options)).param_groups
        return sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"])

    whole = sum(p.numel() for p in model("vit96+lsa").parameters())
    assert decayed(weight_decay_all=True) == whole
    assert decayed() < whole - 7_000
    with pytest.raises(InputError, match="--weight-decay-all and --layer-decay: give one of them"):
        OptimConfig(weight_decay_all=True, layer_decay=0.8)
