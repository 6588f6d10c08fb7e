"""Test the augmentation pipeline: presets, options, and augmented batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from scipy import stats
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from smallvit.config.options import AugmentConfig
from smallvit.datasets.augment import Augment, Draws, Mixing, normalize
from smallvit.datasets.auto_augment import Step, create_policy
from smallvit.datasets.functional import apply_operations, normal_noise
from smallvit.datasets.presets import PRESETS, preset
from smallvit.datasets.upload import upload
from smallvit.utils.errors import InputError
from tests.sweep import sweep

VARIED = ("none", "basic", "mix", "lee2021", "deit", "deit3", "augreg-medium2")
"""Presets with different operations."""

CLASSES = 5
OPTIONS = get_type_hints(AugmentConfig)


def batch(b: int = 64, h: int = 12, w: int = 16, c: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, CLASSES, (b,), generator=generator)


def statistics(c: int = 3) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:c], torch.tensor([0.2, 0.3, 0.4])[:c]
    return mean[:, None, None], std[:, None, None]


def apply(augment: Augment, pixels: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    return augment.apply(pixels, labels, draws, *statistics(pixels.shape[1]), CLASSES)


def run(augment: Augment, seed: int = 0, **shape: int) -> tuple[Tensor, Tensor, Draws, Tensor, Tensor]:
    pixels, labels = batch(**shape)
    draws = augment.draw(np.random.default_rng(seed), len(pixels), *pixels.shape[-2:])
    return *apply(augment, pixels, labels, draws), draws, pixels, labels


def made(img_size: int = 32, may_flip: bool = True, auto: str = "mix", own: str = "cifar10", **options: Any) -> Augment:
    return Augment.from_config(AugmentConfig(**options), img_size, may_flip, auto, own)


def always(name: str, strength: float) -> Callable[[np.random.Generator, int, int], list[Step]]:
    return lambda rng, b, size: [Step(np.full(b, name), np.full(b, strength))]


# every preset


@sweep("c", [3, 1])
@sweep("img_size", [32, 64])
@sweep("aug", VARIED)
def test_presets_give_finite_images_and_label_distributions(aug: str, img_size: int, c: int) -> None:
    augment = made(img_size, aug=aug)
    mixed = False
    for seed in range(3):
        x, targets, _, pixels, _ = run(augment, seed, b=15, h=img_size, w=img_size, c=c)
        assert x.shape == pixels.shape
        assert targets.shape == (15, CLASSES)
        assert x.dtype == targets.dtype == torch.float32
        assert x.isfinite().all()
        assert (targets >= 0).all()
        torch.testing.assert_close(targets.sum(1), torch.ones(15))
        assert not x.requires_grad
        mixed |= not (targets.max(1).values == 1).all()
        assert torch.equal(pixels, batch(15, img_size, img_size, c)[0]), "the given images must stay"
    assert mixed == (preset(aug, img_size)["mixup_prob"] > 0)


@sweep("aug", VARIED)
def test_the_same_seed_gives_the_same_batch_and_another_another(aug: str) -> None:
    augment = made(aug=aug)
    (x, targets, *_), (again, same, *_), (other, *_) = (run(augment, seed, h=32, w=32) for seed in (3, 3, 4))
    assert torch.equal(x, again)
    assert torch.equal(targets, same)
    assert torch.equal(x, other) == (aug == "none")


@sweep("c", [3, 1])
@sweep("img_size", [32, 64])
@sweep("aug", VARIED)
def test_a_part_of_the_batch_comes_out_as_in_the_whole(aug: str, img_size: int, c: int) -> None:
    augment = made(img_size, aug=aug, color_jitter=0.3)
    for seed in (0, 1):
        x, targets, draws, pixels, labels = run(augment, seed, b=23, h=img_size, w=img_size, c=c)
        for chosen in (slice(0, 8), slice(8, 10), slice(10, 23)):
            part, labels_of_part = apply(augment, pixels[chosen], labels[chosen], draws.part(chosen))
            assert torch.equal(part, x[chosen])
            assert torch.equal(labels_of_part, targets[chosen])


@sweep("img_size", [32, 64])
def test_none_leaves_images_as_they_are(img_size: int) -> None:
    x, targets, _, pixels, labels = run(made(img_size, aug="none"), h=img_size, w=img_size)
    mean, std = statistics()
    assert torch.equal(x, normalize(pixels, mean, std))
    assert torch.equal(targets, torch.eye(CLASSES)[labels])


def test_every_preset_can_be_asked_for() -> None:
    assert set(get_args(OPTIONS["aug"])) == {"auto", *PRESETS}


# what a batch goes through


def test_normalize_equals_torchvision() -> None:
    pixels, _ = batch()
    mean, std = statistics()
    expected = V.normalize(
        V.to_dtype(pixels, torch.float32, scale=True), mean.flatten().tolist(), std.flatten().tolist()
    )
    torch.testing.assert_close(normalize(pixels, mean, std), expected)


@sweep(("crop", "mode"), [("pad", "constant"), ("reflect", "reflect"), ("resized", None)])
def test_crop_flip_and_normalization_equal_torchvision_per_image(crop: str, mode: str | None) -> None:
    padding = 0 if mode is None else 3
    x, _, draws, pixels, _ = run(Augment(crop=crop, padding=padding, crop_scale=0.2, flip=0.5))
    mean, std = (values.flatten().tolist() for values in statistics())
    box = draws.crop
    for i, image in enumerate(pixels):
        top, left = int(box.top[i]), int(box.left[i])
        if mode is None:
            image = V.resized_crop(image, top, left, int(box.bottom[i]) - top, int(box.right[i]) - left, [12, 16])
        else:
            image = V.crop(V.pad(image, [padding], padding_mode=mode), top, left, 12, 16)
        image = V.horizontal_flip(image) if draws.flip[i] else image
        expected = V.normalize(V.to_dtype(image, torch.float32, scale=True), mean, std)
        one_level = 1 / 255 / 0.2 if mode is None else 0
        torch.testing.assert_close(x[i], expected, atol=one_level + 1e-5, rtol=0)


def test_crops_lie_anywhere_in_the_padded_image_and_half_the_images_are_mirrored() -> None:
    n = 9000
    draws = Augment(crop="pad", padding=4, flip=0.5).draw(np.random.default_rng(0), n, 32, 32)
    for start, end in ((draws.crop.top, draws.crop.bottom), (draws.crop.left, draws.crop.right)):
        assert stats.chisquare(np.bincount(start, minlength=9)).pvalue > 1e-3
        assert len(np.bincount(start)) == 9
        assert (end - start == 32).all()
    assert abs(np.corrcoef(draws.crop.top, draws.crop.left)[0, 1]) < 0.05
    assert draws.flip.mean() == pytest.approx(0.5, abs=0.03)


@sweep(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_flip_is_a_probability(flip: float, mirrored: bool) -> None:
    x, _, _, pixels, _ = run(Augment(flip=flip))
    plain = normalize(pixels, *statistics())
    assert torch.equal(x, plain.flip(-1) if mirrored else plain)


def test_resized_crops_keep_at_least_the_share_of_the_area_that_was_asked_for() -> None:
    boxes = Augment(crop="resized", crop_scale=0.3).draw(np.random.default_rng(0), 5000, 64, 64).crop
    share = (boxes.bottom - boxes.top) * (boxes.right - boxes.left) / 64**2
    assert 0.28 < share.min() < 0.32
    assert share.max() > 0.97


def test_policies_come_after_the_crop_one_after_the_other() -> None:
    dim = Augment(crop="pad", padding=3, policies=(always("Invert", 0), always("Brightness", 0.5)))
    pixels, _ = batch()
    draws = dim.draw(np.random.default_rng(0), 64, 12, 16)
    for i, mine in enumerate(dim.transform(pixels, dim.plan(draws, pixels))):
        cropped = V.crop(V.pad(pixels[i], [3]), int(draws.crop.top[i]), int(draws.crop.left[i]), 12, 16)
        assert torch.equal(mine, V.adjust_brightness(V.invert(cropped), 0.5))


def test_policies_fill_with_middle_gray() -> None:
    pixels, _ = batch()
    moved = Augment(policies=(always("TranslateX", 5),))
    ours = moved.transform(pixels, moved.plan(moved.draw(np.random.default_rng(0), 64, 12, 16), pixels))
    assert (ours[..., :5] == 128).all()
    assert torch.equal(ours[..., 5:], pixels[..., :-5])


def test_deits_policies_move_in_the_data_sets_mean_and_no_other_presets() -> None:
    """Return the mean of each channel in gray levels, as timm's `img_mean`; erasing and mixing are left out."""
    for aug in PRESETS:
        augment = replace(
            made(64, aug=aug),
            crop="none",
            flip=0.0,
            policies=(always("TranslateX", 5),),
            random_erasing=0.0,
            mixing=Mixing(),
        )
        x, *_ = run(augment)
        pixels = (x * statistics()[1] + statistics()[0]) * 255
        expected = torch.tensor([128.0, 102.0, 76.0] if aug.startswith("deit") else [128.0] * 3)
        torch.testing.assert_close(pixels[..., :5], expected[:, None, None].expand(64, 3, 12, 5), atol=1e-3, rtol=0)
        assert augment.bicubic == aug.startswith("deit")


def test_policies_are_reported_the_number_of_images_and_the_shorter_side() -> None:
    asked = []
    Augment(policies=(lambda rng, b, size: asked.append((b, size)) or [],)).draw(np.random.default_rng(0), 7, 40, 24)
    assert asked == [(7, 24)]


def test_images_that_are_not_square_go_through_everything() -> None:
    for spec in ("trivial", "rand-m9-n2-p1-mmax20", "3augment", "autoaugment", "rand-m9-n2-inc1"):
        augment = made(24, aug="deit", auto_augment=spec, crop="resized")
        x, *_ = run(augment, b=32, h=24, w=40)
        assert x.shape == (32, 3, 24, 40)
        assert x.isfinite().all()


def test_erased_rectangles_are_the_mean_color_and_nothing_else_changes() -> None:
    x, _, draws, pixels, _ = run(Augment(random_erasing=0.5))
    inside = upload(draws.erase.spans(12, 16), x.device).mask.expand_as(x)
    assert x[inside].eq(0).all()
    assert torch.equal(x[~inside], normalize(pixels, *statistics())[~inside])
    assert inside.flatten(1).any(1).float().mean().item() == pytest.approx(0.5, abs=0.2)


def test_erased_rectangles_are_normal_noise_of_the_images_own_key_where_asked_for() -> None:
    x, _, draws, pixels, _ = run(Augment(random_erasing=0.7, random_erasing_fill="noise"), b=200, h=32, w=32)
    inside = upload(draws.erase.spans(32, 32), x.device).mask.expand_as(x)
    assert torch.equal(x[~inside], normalize(pixels, *statistics())[~inside])
    noise = normal_noise(torch.from_numpy(draws.noise), 3 * 32 * 32).view_as(x)
    assert torch.equal(x[inside], noise[inside])
    assert stats.kstest(x[inside].double().numpy(), "norm").pvalue > 1e-3
    assert len(set(draws.noise.tolist())) == 200
    for i in np.flatnonzero(draws.erase.bottom > draws.erase.top)[:20]:
        red, green, blue = x[i][:, inside[i, 0]]
        assert not red.equal(green)
        assert not green.equal(blue)


@sweep("area", [0.4, 1 / 3])
def test_erasing_takes_from_2_percent_of_the_area_to_its_largest_share(area: float) -> None:
    boxes = Augment(random_erasing=0.25, erasing_area=area).draw(np.random.default_rng(0), 20_000, 64, 64).erase
    share = (boxes.bottom - boxes.top) * (boxes.right - boxes.left) / 64**2
    assert (share > 0).mean() == pytest.approx(0.25, abs=0.02)
    assert share[share > 0].min() == pytest.approx(0.02, rel=0.1)
    assert share.max() == pytest.approx(area, rel=0.05)
    ratio = ((boxes.bottom - boxes.top) / np.maximum(1, boxes.right - boxes.left))[share > 0.05]
    assert (ratio.min(), ratio.max()) == pytest.approx((0.3, 1 / 0.3), rel=0.1)


def test_mixing_comes_last_and_mixes_what_was_erased() -> None:
    augment = Augment(random_erasing=1.0, mixing=Mixing(mixup_prob=1.0, mixup=1.0))
    x, targets, draws, pixels, labels = run(augment)
    plain, _ = apply(replace(augment, mixing=Mixing()), pixels, labels, draws)
    kept = torch.from_numpy(draws.mix.kept).float()
    partner = torch.arange(64).view(32, 2).flip(1).flatten()
    weight = kept[:, None, None, None]
    torch.testing.assert_close(x, weight * plain + (1 - weight) * plain[partner], atol=1e-5, rtol=0)
    one_hot = torch.eye(CLASSES)[labels]
    torch.testing.assert_close(targets, kept[:, None] * one_hot + (1 - kept[:, None]) * one_hot[partner])


def test_labels_without_mixing_are_one_hot() -> None:
    _, targets, _, _, labels = run(made(12, aug="basic", random_erasing=0.5))
    assert torch.equal(targets, torch.eye(CLASSES)[labels])


# published numbers


def test_the_papers_preset_has_the_numbers_of_its_code() -> None:
    values = preset("lee2021", 32)
    assert values["auto_augment"] == "autoaugment"
    assert (values["random_erasing"], values["erasing_area"]) == (0.25, 0.4)
    assert (values["mixup_prob"], values["mixup"], values["cutmix"], values["mixup_mode"]) == (0.5, 1.0, 1.0, "batch")
    assert (values["flip"], values["color_jitter"], values["aug_repeats"]) == (0.5, 0.0, 1)
    augment = made(32, aug="lee2021")
    assert (augment.crop, augment.padding) == ("pad", 4)
    assert augment.mixing == Mixing(mixup_prob=0.5, mixup=1.0, cutmix=1.0, mixup_mode="batch", mix_major=False)


def test_deits_preset_has_the_numbers_of_its_table_9() -> None:
    values = preset("deit", 224)
    assert values["auto_augment"] == "rand-m9-n2-mstd0.5-inc1"
    timms = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    assert (values["random_erasing"], values["erasing_area"], values["random_erasing_fill"]) == (
        0.25,
        timms.max_area,
        "noise",
    )
    assert (values["crop"], values["crop_scale"], values["flip"], values["aug_repeats"]) == ("resized", 0.08, 0.5, 3)
    assert values["color_jitter"] == 0  # timm leaves it out where there is a policy
    assert made(224, aug="deit").mixing == Mixing(
        mixup_prob=1.0, mixup=0.8, cutmix=1.0, mixup_mode="batch", mix_major=False
    )


def test_deit_3s_preset_has_the_numbers_of_its_paper() -> None:
    values = preset("deit3", 224)
    assert (values["auto_augment"], values["color_jitter"], values["random_erasing"]) == ("3augment", 0.3, 0.0)
    assert (values["crop"], values["crop_scale"], values["flip"], values["aug_repeats"]) == ("resized", 0.08, 0.5, 3)
    assert made(224, aug="deit3").mixing == Mixing(
        mixup_prob=1.0, mixup=0.8, cutmix=1.0, mixup_mode="batch", mix_major=False
    )
    small = made(32, aug="deit3")
    assert (small.crop, small.padding) == ("reflect", 4)


AUGREG = {  # RandAugment's layers and magnitude, Mixup's alpha: section 3.3 and table 4 of arXiv:2106.10270
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}


@sweep("level", AUGREG)
def test_augregs_presets_have_the_numbers_of_its_seven_levels(level: str) -> None:
    layers, magnitude, alpha = AUGREG[level]
    values = preset(f"augreg-{level}", 224)
    assert values["auto_augment"] == (f"rand-m{magnitude}-n{layers}-p1-mmax20" if layers else "none")
    assert (values["crop"], values["crop_scale"], values["flip"]) == ("resized", 0.05, 0.5)
    assert (values["color_jitter"], values["random_erasing"], values["aug_repeats"]) == (0, 0, 1)
    augment = made(224, aug=f"augreg-{level}")
    assert sum(len(each(np.random.default_rng(0), 2, 224)) for each in augment.policies) == layers
    assert bool(augment.mixing) == (alpha > 0)
    if alpha:
        assert augment.mixing == Mixing(mixup_prob=1.0, mixup=alpha, cutmix=0.0, mixup_mode="batch", mix_major=True)


def test_the_seven_levels_of_augreg_are_all_there_are() -> None:
    assert {name.removeprefix("augreg-") for name in PRESETS if name.startswith("augreg-")} == set(AUGREG)


@sweep("aug", ["deit", "deit3", *(f"augreg-{level}" for level in AUGREG)])
def test_presets_of_large_images_pad_small_ones(aug: str) -> None:
    assert made(33, aug=aug).crop == "resized"
    assert made(33, aug=aug).padding == 0
    assert made(32, aug=aug).crop == ("reflect" if aug == "deit3" else "pad")
    assert made(32, aug=aug).padding == 4


@sweep("aug", ["lee2021", "deit", "deit3", "augreg-medium1"])
def test_a_presets_policy_is_the_one_that_it_names(aug: str) -> None:
    augment = made(64, aug=aug, own="svhn")
    values = preset(aug, 64)
    assert len(augment.policies) == 1 + (values["color_jitter"] > 0)
    named = create_policy(values["auto_augment"], "svhn")
    assert named is not None
    for mine, expected in zip(
        augment.policies[0](np.random.default_rng(0), 50, 64), named(np.random.default_rng(0), 50, 64), strict=True
    ):
        assert mine.names.tolist() == expected.names.tolist()
        assert mine.strengths.tolist() == expected.strengths.tolist()


# options


@sweep(
    ("options", "expected"),
    [
        ({"crop": "none"}, {"crop": "none", "padding": 0}),
        ({"crop": "reflect"}, {"crop": "reflect", "padding": 4}),
        ({"crop": "resized"}, {"crop": "resized", "padding": 0}),
        ({"crop_padding": 1}, {"padding": 1}),
        ({"crop_padding": 0}, {"padding": 0}),
        ({"crop": "resized", "crop_scale": 0.5}, {"crop": "resized", "crop_scale": 0.5, "padding": 0}),
        ({"flip": 0}, {"flip": 0}),
        ({"flip": 0.9}, {"flip": 0.9}),
        ({"auto_augment": "none"}, {"policies": ()}),
        ({"random_erasing": 0}, {"random_erasing": 0}),
        ({"random_erasing": 0.7}, {"random_erasing": 0.7}),
        ({"random_erasing_fill": "noise"}, {"random_erasing_fill": "noise"}),
        ({"aug_repeats": 2}, {"aug_repeats": 2}),
    ],
)
def test_given_options_override_the_preset(options: dict[str, Any], expected: dict[str, Any]) -> None:
    plain, augment = made(aug="lee2021"), made(aug="lee2021", **options)
    for name in Augment.__dataclass_fields__:
        if name in expected:
            assert getattr(augment, name) == expected[name]
        elif name == "policies":
            assert len(augment.policies) == len(plain.policies) == 1
        else:
            assert getattr(augment, name) == getattr(plain, name), name


@sweep("options", [{"mixup_prob": 0.1}, {"mixup_prob": 0}, {"mixup": 0}, {"cutmix": 0.3}, {"mixup_mode": "elem"}])
def test_given_mixing_options_override_the_preset(options: dict) -> None:
    assert made(aug="lee2021", **options).mixing == replace(made(aug="lee2021").mixing, **options)


def test_options_add_to_a_preset_what_it_has_not() -> None:
    augment = made(
        aug="none", auto_augment="trivial", color_jitter=0.4, mixup=0.2, mixup_prob=1.0, random_erasing=0.1, flip=0.5
    )
    assert len(augment.policies) == 2
    (first,), (*jittered,) = (each(np.random.default_rng(0), 400, 32) for each in augment.policies)
    assert len(set(first.names.tolist())) == 14
    factors = np.stack([step.strengths for step in jittered])
    assert (factors.min(), factors.max()) == pytest.approx((0.6, 1.4), abs=0.01)
    assert (augment.mixing.mixup, augment.mixing.mixup_prob, augment.random_erasing, augment.flip) == (
        0.2,
        1.0,
        0.1,
        0.5,
    )
    assert made(aug="deit3", color_jitter=0).policies == made(aug="deit3").policies[:1]
    assert len(made(aug="basic", color_jitter=0.2).policies) == 1


@sweep("aug", VARIED)
def test_nothing_is_mirrored_where_that_changes_meaning_unless_it_is_asked_for(aug: str) -> None:
    assert made(aug=aug).flip == (0 if aug == "none" else 0.5)
    assert made(aug=aug, may_flip=False).flip == 0
    assert made(aug=aug, may_flip=False, flip=0.5).flip == 0.5


@sweep("img_size", [8, 28, 32, 64])
def test_the_border_is_an_eighth_of_the_image_by_default(img_size: int) -> None:
    assert made(img_size, aug="basic").padding == round(img_size / 8)


def test_a_border_wider_than_the_image_is_refused_in_one_line() -> None:
    for crop, most in (("pad", 8), ("reflect", 7)):
        augment = made(8, aug="basic", crop=crop, crop_padding=most)
        assert run(augment, h=8, w=8)[0].isfinite().all()
        with pytest.raises(InputError, match=rf"^--crop-padding {most + 1}: .*8") as caught:
            made(8, aug="basic", crop=crop, crop_padding=most + 1)
        assert "\n" not in str(caught.value)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match="--auto-augment randaugment"):
        made(auto_augment="randaugment")


@sweep(
    ("name", "value"),
    [
        ("flip", 1.5),
        ("flip", -0.1),
        ("random_erasing", 2.0),
        ("mixup_prob", float("nan")),
        ("crop_padding", -1),
        ("color_jitter", -0.5),
        ("color_jitter", float("inf")),
        ("mixup", -1.0),
        ("cutmix", float("nan")),
        ("crop_scale", 0.0),
        ("crop_scale", 1.1),
        ("aug_repeats", 0),
    ],
)
def test_options_out_of_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} "):
        AugmentConfig(**{name: value})


def test_auto_takes_the_preset_that_suits_the_data() -> None:
    for suits in ("mix", "basic", "none"):
        assert made(auto=suits) == made(aug=suits)
    assert made(aug="basic", auto="mix") == made(aug="basic")
    assert Augment.from_config(AugmentConfig(), 32, flip=True) == made(aug="mix")


@sweep(
    ("options", "message"),
    [
        ({"aug": "basic", "crop_padding": 65}, r"--crop-padding 65: expected at most 64 for images of 64 px"),
        ({"aug": "basic", "crop": "reflect", "crop_padding": 64}, r"--crop-padding 64: expected at most 63"),
    ],
)
def test_borders_wider_than_the_image_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augment.from_config(AugmentConfig(**options), 64, flip=True)


def test_the_papers_border_has_four_pixels_at_any_size() -> None:
    for size in (32, 64):
        assert Augment.from_config(AugmentConfig(aug="lee2021"), size, flip=True).padding == 4


@sweep("spread", range(1, 256))
def test_autocontrast_reaches_white_from_any_range(spread: int) -> None:
    levels = torch.tensor([0, spread], dtype=torch.uint8).view(1, 1, 1, 2)
    assert apply_operations(levels, ["AutoContrast"], np.zeros(1)).flatten().tolist() == [0, 255]


@sweep(
    ("options", "message"),
    [
        ({"aug": "basic", "cutmix": 0.5}, "--mixup-mode have no effect without --mixup-prob"),
        ({"aug": "basic", "mixup_prob": 1.0}, "--mixup-prob has no effect without --mixup or --cutmix"),
        (
            {"aug": "basic", "random_erasing_fill": "noise"},
            "has no effect without --random-erasing; add e.g. --random-erasing 0.25",
        ),
        ({"aug": "none", "alternate_flip": True}, "--alternate-flip has no effect without --flip"),
        ({"aug": "basic", "crop_scale": 0.3}, "--crop-scale has no effect with --crop pad; add --crop resized"),
        ({"aug": "none", "crop_padding": 2}, "--crop-padding has no effect with --crop none; add --crop pad"),
    ],
)
def test_options_without_effect_are_warned_of(
    options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Augment.from_config(AugmentConfig(**options), 32, flip=True)
    warning = capsys.readouterr().err
    assert message in warning
    assert len(warning.splitlines()) == 1


def test_a_presets_border_gives_way_to_tiny_images() -> None:
    assert Augment.from_config(AugmentConfig(aug="lee2021"), 3, flip=True).padding == 3
