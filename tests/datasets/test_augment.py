"""Batched augmentation against torchvision's functions and against its own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import RandomErasing

from smallvit.config import AugmentConfig, InputError
from smallvit.datasets.augment import (
    ERASED_AREA,
    ERASED_RATIO,
    Augment,
    Draws,
    crop_and_flip,
    cutmix_boxes,
    erasing_boxes,
    inside,
    normalise,
)

OFF = {"padding": 0, "flip": 0.0, "erasing": 0.0, "mix_prob": 0.0, "mixup": 0.0, "cutmix": 0.0}
ZERO, ONE = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)


def batch(b: int = 64, h: int = 12, w: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 5, (b,), generator=generator)


def run(augment: Augment, seed: int = 0, b: int = 64) -> tuple[Tensor, Tensor, Draws, Tensor, Tensor]:
    pixels, labels = batch(b)
    draws = augment.draw(np.random.default_rng(seed), b, *pixels.shape[-2:])
    return *augment.apply(pixels, labels, draws, ZERO, ONE, classes=5), draws, pixels, labels


@pytest.mark.parametrize("padding", [0, 3])
def test_crop_and_flip_equal_torchvisions_for_the_same_parameters(padding: int) -> None:
    pixels, _ = batch()
    draws = Augment(**OFF | {"padding": padding, "flip": 0.5}).draw(np.random.default_rng(0), 64, 12, 16)
    ours = crop_and_flip(pixels, padding, *(torch.from_numpy(value) for value in (draws.top, draws.left, draws.flip)))
    for image, top, left, flip, mine in zip(pixels, draws.top, draws.left, draws.flip, ours, strict=True):
        expected = TF.crop(TF.pad(image, [padding]), int(top), int(left), 12, 16)
        assert torch.equal(mine, TF.horizontal_flip(expected) if flip else expected)
    assert 0 < draws.flip.sum() < 64
    assert padding == 0 or {0, 2 * padding} <= set(draws.top.tolist())


def test_normalise_equals_torchvisions() -> None:
    pixels, _ = batch()
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    expected = TF.normalize(TF.to_dtype(pixels, torch.float32, scale=True), mean, std)
    ours = normalise(pixels, torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None])
    torch.testing.assert_close(ours, expected)


def test_erased_rectangles_keep_to_the_area_and_ratio_they_were_drawn_with() -> None:
    n, h, w = 20_000, 64, 64
    boxes = erasing_boxes(np.random.default_rng(0), np.ones(n, bool), h, w)
    height, width = boxes.bottom - boxes.top, boxes.right - boxes.left
    assert boxes.top.min() >= 0
    assert boxes.bottom.max() <= h
    assert boxes.right.max() <= w
    area, ratio = height * width / (h * w), height / width
    assert ERASED_AREA[0] * 0.8 < area.min() < area.max() < ERASED_AREA[1] * 1.05
    assert ERASED_RATIO[0] * 0.8 < ratio.min() < ratio.max() < ERASED_RATIO[1] * 1.25


def test_erased_rectangles_are_distributed_as_torchvisions() -> None:
    n, h, w = 4000, 32, 24
    boxes = erasing_boxes(np.random.default_rng(0), np.ones(n, bool), h, w)
    torch.manual_seed(0)
    image = torch.zeros(1, h, w)
    theirs = np.array([RandomErasing.get_params(image, ERASED_AREA, ERASED_RATIO, [0.0])[:4] for _ in range(n)])
    ours = np.stack([boxes.top, boxes.left, boxes.bottom - boxes.top, boxes.right - boxes.left], axis=1)
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 19)
        ours_q, theirs_q = (np.quantile(values[:, column], quantiles) for values in (ours, theirs))
        assert np.abs(ours_q - theirs_q).max() <= 1.0, column


def test_erasing_sets_its_rectangle_to_the_mean_colour_and_nothing_else() -> None:
    x, _, draws, pixels, _ = run(Augment(**OFF | {"erasing": 0.5}))
    mask = inside(draws.erase, 12, 16, x.device).expand_as(x)
    assert x[mask].eq(0).all()
    assert torch.equal(x[~mask], normalise(pixels, ZERO, ONE)[~mask])
    erased = mask.flatten(1).any(1).float().mean().item()
    assert 0.3 < erased < 0.7


def test_mixup_is_a_convex_combination_with_the_previous_image() -> None:
    x, targets, draws, pixels, labels = run(Augment(**OFF | {"mix_prob": 1.0, "mixup": 0.8}))
    plain = normalise(pixels, ZERO, ONE)
    for i in range(64):
        weight = draws.mixup[i]
        torch.testing.assert_close(x[i], (weight * plain[i] + (1 - weight) * plain[i - 1]).float())
        expected = torch.zeros(5, dtype=torch.float64)
        expected[labels[i]] += weight
        expected[labels[i - 1]] += 1 - weight
        torch.testing.assert_close(targets[i], expected.float())
    assert draws.mixup.std() > 0.1


def test_cutmix_labels_weigh_what_the_pixels_show() -> None:
    x, targets, _, pixels, labels = run(Augment(**OFF | {"mix_prob": 1.0, "cutmix": 1.0}))
    plain = normalise(pixels, ZERO, ONE)
    for i in range(64):
        own = x[i].eq(plain[i]).all(0)
        assert x[i][:, ~own].eq(plain[i - 1][:, ~own]).all()
        if labels[i] != labels[i - 1]:
            assert targets[i, labels[i]].item() == pytest.approx(own.float().mean().item(), abs=0.02)


def test_cutmix_rectangles_cover_the_drawn_share_before_the_border_cuts_them() -> None:
    kept = np.random.default_rng(1).beta(1, 1, 5000)
    boxes = cutmix_boxes(np.random.default_rng(0), np.ones(5000, bool), kept, 64, 64)
    height, width = boxes.bottom - boxes.top, boxes.right - boxes.left
    whole = (boxes.top > 0) & (boxes.left > 0) & (boxes.bottom < 64) & (boxes.right < 64)
    share = (height * width / 64**2)[whole]
    assert whole.sum() > 500
    assert np.abs(share - (1 - kept[whole])).max() < 0.05


def test_mixing_happens_per_image_with_the_given_probability() -> None:
    augment = Augment(**OFF | {"mix_prob": 0.5, "mixup": 1.0, "cutmix": 1.0})
    draws = augment.draw(np.random.default_rng(0), 4000, 32, 32)
    by_mixup = (draws.mixup < 1).mean()
    by_cutmix = (draws.cutmix.bottom > draws.cutmix.top).mean()
    assert by_mixup == pytest.approx(0.25, abs=0.03)
    assert by_cutmix == pytest.approx(0.25, abs=0.03)
    assert not ((draws.mixup < 1) & (draws.cutmix.bottom > draws.cutmix.top)).any()


@pytest.mark.parametrize("aug", ["none", "basic", "mix"])
def test_presets_give_label_distributions_and_finite_images(aug: str) -> None:
    augment = Augment.from_config(AugmentConfig(aug=aug), img_size=16, may_flip=True)
    x, targets, *_ = run(augment)
    assert x.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    assert (targets.max(1).values == 1).all() == (aug != "mix")


def test_none_leaves_images_as_they_are() -> None:
    x, targets, _, pixels, labels = run(Augment.from_config(AugmentConfig(aug="none"), 16, True))
    assert torch.equal(x, normalise(pixels, ZERO, ONE))
    assert torch.equal(targets.argmax(1), labels)


def test_a_border_wider_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match="at most the image size, 8"):
        Augment.from_config(AugmentConfig(crop_padding=9), 8, may_flip=True)


def test_given_options_take_the_place_of_the_presets() -> None:
    augment = Augment.from_config(AugmentConfig(aug="mix", cutmix=0, crop_padding=1, flip=1), 32, may_flip=False)
    assert (augment.cutmix, augment.padding, augment.flip, augment.mixup) == (0, 1, 1, 1)
    assert Augment.from_config(AugmentConfig(aug="basic"), 32, may_flip=False).flip == 0
    assert Augment.from_config(AugmentConfig(aug="basic"), 32, may_flip=True).padding == 4


def test_auto_takes_the_preset_that_suits_the_data() -> None:
    mix, basic = (Augment.from_config(AugmentConfig(aug=aug), 32, may_flip=True) for aug in ("mix", "basic"))
    assert Augment.from_config(AugmentConfig(), 32, may_flip=True) == mix
    assert Augment.from_config(AugmentConfig(), 32, may_flip=True, auto="basic") == basic
