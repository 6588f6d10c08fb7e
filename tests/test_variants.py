"""Variants of a plain ViT, against equations written out and timm's own models."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import DropPath

import smallvit
from smallvit.errors import InputError
from smallvit.exports.timm_folder import is_timms
from smallvit.inherit import inherited
from smallvit.models import create_model
from smallvit.optim import create_optimizer
from smallvit.options import OptimConfig
from smallvit.setup import prepare

ALL = {"average_pool": True, "sincos": True, "layer_scale": 0.1, "rising_drop_path": True}


def model(arch: str = "vit96", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(arch, img_size=32, num_classes=10, **options).eval()


@pytest.mark.parametrize("arch", ["vit", "vit96", "vit_tiny_patch16_224"])
def test_the_head_reads_the_mean_of_the_patches_and_nothing_else(arch: str) -> None:
    pooled, images = model(arch, average_pool=True), torch.randn(2, 3, 32, 32)
    tokens = pooled.patch_embed(images) + pooled.pos_embed
    assert tokens.shape[1] == pooled.patch_embed.num_patches
    for block in pooled.blocks:
        tokens = block(tokens)
    mean = sum(tokens[:, n] for n in range(tokens.shape[1])) / tokens.shape[1]
    torch.testing.assert_close(pooled(images), pooled.head(pooled.fc_norm(mean)))


@pytest.mark.parametrize("arch", ["vit96", "vit_tiny_patch16_224"])
def test_positions_are_sines_and_cosines_of_row_and_column(arch: str) -> None:
    fixed = model(arch, sincos=True)
    rows, columns = fixed.patch_embed.grid_size
    quarter = fixed.embed_dim // 4
    assert fixed.pos_embed[0, 0].eq(0).all(), "the class token has no place"
    for row, column, k in ((0, 0, 0), (1, 2, 0), (rows - 1, 0, quarter - 1), (rows - 1, columns - 1, quarter // 2)):
        place = fixed.pos_embed[0, 1 + row * columns + column]
        angle = [each / 10_000 ** (k / quarter) for each in (row, column)]
        wanted = [f(a) for a in angle for f in (math.sin, math.cos)]
        found = [place[part * quarter + k].item() for part in range(4)]
        assert sorted(found) == pytest.approx(sorted(wanted), abs=1e-5)


def test_fixed_positions_are_not_learnt() -> None:
    fixed = model(sincos=True).train()
    before = fixed.pos_embed.detach().clone()
    optimizer = create_optimizer(fixed, OptimConfig(lr=0.1, weight_decay=0.5, decay_all=True))
    fixed(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(fixed.pos_embed, before)


def test_layer_scale_multiplies_every_branch() -> None:
    scaled, plain, images = model(layer_scale=0.25), model(), torch.randn(2, 3, 32, 32)
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"blocks.{n}.ls{k}.gamma" for n in range(6) for k in (1, 2)]
    tokens = plain._pos_embed(plain.patch_embed(images))
    for block in plain.blocks:
        tokens = tokens + 0.25 * block.attn(block.norm1(tokens))
        tokens = tokens + 0.25 * block.mlp(block.norm2(tokens))
    torch.testing.assert_close(scaled(images), plain.head(plain.norm(tokens[:, 0])))


def test_timms_own_stochastic_depth_rises_anyway() -> None:
    own, asked = (model("vit_tiny_patch16_224", rising_drop_path=rising) for rising in (False, True))
    rates = [[block.drop_path1.drop_prob for block in each.blocks[1:]] for each in (own, asked)]
    assert rates[0] == pytest.approx(rates[1])


def test_stochastic_depth_grows_in_a_line() -> None:
    rates = [layer.drop_prob for layer in model(rising_drop_path=True).modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.1 * block / 5 for block in range(6) for _ in range(2)])


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("swin", {"sincos": True}, "--sincos: --arch swin is no plain ViT"),
        ("resnet20", {"average_pool": True}, "--average-pool: --arch resnet20 is no plain ViT"),
        ("deit3_small_patch16_224", {"layer_scale": 0.1}, None),  # timm's plain ViT
        ("deit_tiny_distilled_patch16_224", {"average_pool": True}, "--average-pool: --arch deit_tiny_distilled"),
        ("vit96", {"average_pool": True, "dist_token": True}, "it has no class token"),
        ("vit_small_patch16_18x2_224", {"layer_scale": 0.1}, "--layer-scale: the blocks of this model have no place"),
    ],
)
def test_what_is_no_plain_vit_has_no_variants(arch: str, options: dict, message: str | None) -> None:
    if message is None:
        assert create_model(arch, img_size=32, num_classes=3, **options).blocks[0].ls1.gamma[0].item() == pytest.approx(
            0.1
        )
        return
    with pytest.raises(InputError) as caught:
        create_model(arch, img_size=32, num_classes=3, **options)
    assert message in str(caught.value)


def test_a_layer_scale_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"--layer-scale 0\.0: expected a factor above 0"):
        smallvit.Config.build(layer_scale=0.0)


def test_a_run_with_all_of_them_and_both_plugins_is_rebuilt_from_its_file(tmp_path) -> None:
    config = smallvit.Config.build(spt=True, lsa=True, epochs=1, train_fraction=0.1, out=str(tmp_path / "run"), **ALL)
    smallvit.train(config)
    loaded = smallvit.load(tmp_path / "run")
    assert loaded.cls_token is None
    assert not loaded.pos_embed.requires_grad
    assert [type(layer).__name__ for layer in (loaded.blocks[0].ls1, loaded.fc_norm)] == ["LayerScale", "LayerNorm"]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a ViT with fixed positions and stochastic depth that rises, at 8 pixels."""
    out = str(tmp_path_factory.mktemp("runs") / "varied")
    smallvit.train(smallvit.Config.build(epochs=1, train_fraction=0.1, out=out, sincos=True, rising_drop_path=True))
    return out


def test_a_run_decides_itself_whether_its_stochastic_depth_rises(varied: str) -> None:
    begun = [inherited(smallvit.Config.build(init=varied, rising_drop_path=rising)).model for rising in (False, True)]
    assert [(each.rising_drop_path, each.sincos) for each in begun] == [(False, True), (True, True)]


def test_fixed_positions_are_computed_anew_for_images_of_another_size(varied: str) -> None:
    resized = prepare(smallvit.Config.build(init=varied, img_size=12)).model
    fresh = create_model("vit96", img_size=12, in_chans=1, num_classes=10, sincos=True)
    torch.testing.assert_close(resized.pos_embed.cpu(), fresh.pos_embed)
    assert not resized.pos_embed.requires_grad


def test_timm_alone_does_not_build_them() -> None:
    spec = {"arch": "vit_tiny_patch16_224", "img_size": 32}
    assert is_timms(spec)
    assert not any(is_timms(spec | {name: value}) for name, value in ALL.items())


def test_weight_decay_acts_on_all_only_where_asked() -> None:
    def decayed(**options: bool) -> int:
        groups = create_optimizer(model(lsa=True), OptimConfig(weight_decay=0.05, **options)).param_groups
        return sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"])

    whole = sum(p.numel() for p in model(lsa=True).parameters())
    assert decayed(decay_all=True) == whole
    assert decayed() < whole - 7_000
    with pytest.raises(InputError, match="--decay-all and --layer-decay: give one of them"):
        OptimConfig(decay_all=True, layer_decay=0.8)
