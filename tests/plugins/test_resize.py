"""Patched models under timm's own interface: image sizes, heads, features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import smallvit
from smallvit.plugins.lsa_layer import Locality

from .sweep import each, sweep
from .zoo import SWIN, VIT, ZOO, build, images

NAMES = ("vit", "vit registers", "deit distilled", "swin", "swin v2", "cait", "pit", "pit distilled")
SIZES = [(24, 24), (16, 32), (48, 24)]
both_ways = each(["paper", "preserve", None], "init")


def model_of(name: str, init: str | None) -> nn.Module:
    model = build(name)
    return model if init is None else smallvit.patch(model, spt=True, lsa=True, init=init)


def picture(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def resized(name: str, size: tuple[int, int]) -> nn.Module:
    """Return the plain model for another size; skip where an older timm damages it."""
    same, model = (smallvit.set_input_size(build(name), one) for one in (ZOO[name][1], size))
    if (
        not torch.allclose(same(images(name)), build(name)(images(name)), atol=1e-4)
        or model(picture(size)).isnan().any()
    ):
        pytest.skip(f"timm's own {name} does not survive set_input_size")
    return model


@pytest.mark.slow
@sweep(NAMES)
@each(SIZES, "size")
@both_ways
@torch.no_grad()
def test_any_image_size_can_be_set_before_or_after_patching(name: str, size: tuple[int, int], init: str | None) -> None:
    plain = resized(name, size)
    torch.manual_seed(0)
    after = smallvit.set_input_size(model_of(name, init), size)
    torch.manual_seed(0)
    before = smallvit.set_input_size(build(name), size)
    if init is not None:
        smallvit.patch(before, spt=True, lsa=True, init=init)
        before.load_state_dict(after.state_dict())
    logits = after(picture(size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    torch.testing.assert_close(before(picture(size)), logits)
    smallvit.unpatch(after)
    assert torch.equal(after(picture(size)), plain(picture(size)))


@sweep(NAMES)
@torch.no_grad()
def test_the_size_that_a_model_has_changes_nothing(name: str) -> None:
    resized(name, (32, 32))
    model = model_of(name, "paper")
    expected = model(images(name))
    assert smallvit.set_input_size(model, ZOO[name][1]) is model
    torch.testing.assert_close(model(images(name)), expected)


@each(["paper", "preserve"], "init")
@each(SIZES, "size")
def test_caits_positions_are_interpolated_as_timm_does(init: str, size: tuple[int, int]) -> None:
    model = model_of("cait", init)
    before = model.pos_embed.detach().clone()
    smallvit.set_input_size(model, size)
    grid = size[0] // 4, size[1] // 4
    assert model.patch_embed.grid_size == grid
    assert isinstance(model.pos_embed, nn.Parameter)
    expected = F.interpolate(before.view(1, 4, 4, 24).permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed, expected.permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(model.pos_embed, resample_abs_pos_embed(before, grid, (4, 4), num_prefix_tokens=0))


@each(["paper", "preserve"], "init")
@each([((24, 24), (11, 11)), ((16, 32), (7, 15)), ((21, 9), (9, 3))], "size", "grid")
def test_pits_positions_are_interpolated(init: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = model_of("pit", init)  # patches of 4, stride 2
    before = model.pos_embed.detach().clone()
    smallvit.set_input_size(model, size)
    assert isinstance(model.pos_embed, nn.Parameter)
    assert model.pos_embed.shape[2:] == grid
    torch.testing.assert_close(model.pos_embed, F.interpolate(before, grid, mode="bicubic", antialias=True))
    assert model(picture(size)).isfinite().all()


def test_frozen_positions_stay_frozen() -> None:
    for name in ("cait", "pit"):
        model = model_of(name, "paper")
        model.pos_embed.requires_grad_(False)
        assert not smallvit.set_input_size(model, 32).pos_embed.requires_grad
        assert smallvit.set_input_size(model_of(name, "paper"), 32).pos_embed.requires_grad


def test_sizes_that_do_not_fit_are_refused_and_change_nothing() -> None:
    for name, size, said in (("cait", 18, "not a multiple of the patch size"), ("pit", 3, "smaller than the patch")):
        model = model_of(name, "paper")
        expected = model(images(name))
        with pytest.raises(ValueError, match=said):
            smallvit.set_input_size(model, size)
        assert torch.equal(model(images(name)), expected)
    with pytest.raises(TypeError, match=r"create it with img_size=\(48, 48\)"):
        smallvit.set_input_size(build("xcit"), 48)


@pytest.mark.parametrize(
    "name", ["vit", "deit distilled", "cait", "pit", "pit distilled", "swin", "swin v2 cr", "levit"]
)
def test_another_number_of_classes(name: str) -> None:
    model = smallvit.patch(build(name), lsa=True)
    model.reset_classifier(7)
    assert model(images(name)).shape == (2, 7)
    assert any(isinstance(layer, Locality) for layer in model.modules())


@each(["vit", "deit distilled", "cait", "pit", "swin", "swin v2", "eva-02", "pvt v2"], "name")
@torch.no_grad()
def test_intermediate_features_are_those_of_the_whole_run(name: str) -> None:
    plain = build(name).forward_intermediates(images(name))[1]
    model = smallvit.patch(build(name), spt=True, lsa=True)
    final, features = model.forward_intermediates(images(name))
    assert [feature.shape for feature in features] == [feature.shape for feature in plain]
    assert not any(torch.allclose(ours, theirs) for ours, theirs in zip(features, plain, strict=True))
    torch.testing.assert_close(final, model.forward_features(images(name)))


FEATURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", features_only=True, **VIT | {"depth": 3}), 16),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN, out_indices=(0, 1)),
        32,
    ),
    "pit": (
        lambda: timm.create_model(
            "pit_ti_224", features_only=True, img_size=20, patch_size=4, stride=2, base_dims=(8,) * 3, depth=(1,) * 3
        ),
        20,
    ),
}


@each(["paper", "preserve"], "init")
@sweep(FEATURES)
@torch.no_grad()
def test_models_of_features_only_can_be_patched(name: str, init: str) -> None:
    make, size = FEATURES[name]
    torch.manual_seed(0)
    model = make().eval()
    plain = model(picture((size, size)))
    smallvit.patch(model, spt=True, lsa=True, init=init)
    ours = model(picture((size, size)))
    assert [feature.shape for feature in ours] == [feature.shape for feature in plain]
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4) == (init == "preserve") for a, b in zip(ours, plain, strict=True)
    )
    smallvit.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(model(picture((size, size))), plain, strict=True))
