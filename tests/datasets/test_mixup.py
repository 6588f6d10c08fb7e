"""Mixup and CutMix, random rectangles and noise, against their definitions and torchvision's and timm's draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import rand_bbox
from torch import Tensor
from torchvision.transforms import RandomErasing, RandomResizedCrop

from smallvit.datasets.augment import (
    Boxes,
    Mix,
    Mixing,
    RectangleDraws,
    crop_boxes,
    cutmix_boxes,
    erasing_boxes,
    mix_pairs,
)
from smallvit.datasets.functional import normal_noise
from smallvit.datasets.upload import upload
from tests.sweep import sweep

CPU = torch.device("cpu")
SPLITMIX64 = (  # the first numbers of SplitMix64 seeded with 1234567, as published with its C code's ports
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(b: int, h: int = 16, w: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, 3, h, w, generator=generator)
    return x, torch.eye(classes)[torch.randint(0, classes, (b,), generator=generator)]


def mixed(x: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    return mix_pairs(x, targets, upload(mix.weights(*x.shape[-2:]), CPU))


def no_boxes(b: int) -> Boxes:
    return Boxes(*(np.zeros(b, dtype=np.int64) for _ in range(4)))


def area(boxes: Boxes) -> np.ndarray:
    return (boxes.bottom - boxes.top) * (boxes.right - boxes.left)


def farthest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference of two samples' distribution functions (Kolmogorov and Smirnov)."""
    return stats.ks_2samp(ours, theirs, method="asymp").statistic


@sweep(("b", "mixing"), [(64, {"mixup": 0.8}), (64, {"cutmix": 1.0}), (33, {"mixup": 1, "cutmix": 1})])
@sweep("per", ["elem", "batch"])
def test_every_image_is_mixed_with_its_neighbor_as_the_equation_says(b: int, mixing: dict, per: str) -> None:
    x, targets = batch(b)
    for seed in range(5):
        mix = Mixing(mixup_prob=1.0, mixup_mode=per, **mixing).draw(rng(seed), b, 16, 12)
        ours, shares = mixed(x, targets, mix)
        for i in range(b):
            partner = min(i + 1 if i % 2 == 0 else i - 1, b - 1)
            weight = np.full((16, 12), mix.kept[i])
            weight[mix.cut.top[i] : mix.cut.bottom[i], mix.cut.left[i] : mix.cut.right[i]] = 0
            expected = weight * x[i].double().numpy() + (1 - weight) * x[partner].double().numpy()
            np.testing.assert_allclose(ours[i].numpy(), expected, atol=1e-5)
            share = weight.mean()
            label = share * targets[i].double().numpy() + (1 - share) * targets[partner].double().numpy()
            np.testing.assert_allclose(shares[i].numpy(), label, atol=1e-6)


@sweep("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_weigh_exactly_what_the_pixels_show(mixing: dict) -> None:
    b, h, w = 512, 32, 16
    _, targets = batch(b)
    shown = targets[:, :, None, None].expand(-1, -1, h, w).contiguous()  # an image per class, of which it is all ones
    mix = Mixing(mixup_prob=0.8, **mixing).draw(rng(), b, h, w)
    ours, shares = mixed(shown, targets, mix)
    torch.testing.assert_close(ours.double().mean(dim=(2, 3)), shares.double(), atol=2e-6, rtol=0)
    if "mixup" not in mixing:  # whole pixels of 32 · 16: binary fractions
        assert torch.equal(ours.mean(dim=(2, 3)), shares)
    torch.testing.assert_close(shares.sum(1), torch.ones(b))
    assert (shares.max(1).values < 0.95).float().mean() > 0.3


def test_cutmix_shows_every_pixel_of_one_of_the_two_unchanged() -> None:
    x, targets = batch(64)
    mix = Mixing(mixup_prob=1.0, cutmix=1.0).draw(rng(), 64, 16, 12)
    ours, _ = mixed(x, targets, mix)
    inside = upload(mix.cut.spans(16, 12), CPU).mask.expand_as(x)
    partner = x.view(32, 2, 3, 16, 12).flip(1).view_as(x)
    assert torch.equal(ours[inside], partner[inside])
    assert torch.equal(ours[~inside], x[~inside])
    assert 0 < inside.float().mean() < 1


@sweep("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}])
@sweep("b", [1, 7])
def test_the_odd_one_out_stays_unchanged(b: int, mixing: dict) -> None:
    x, targets = batch(b)
    for seed in range(10):
        for per in ("elem", "batch"):
            ours, shares = mixed(
                x, targets, Mixing(mixup_prob=1.0, mixup_mode=per, **mixing).draw(rng(seed), b, 16, 12)
            )
            torch.testing.assert_close(ours[-1], x[-1], atol=1e-6, rtol=0)
            torch.testing.assert_close(shares[-1], targets[-1])


def test_what_is_not_mixed_stays_to_the_last_bit() -> None:
    x, targets = batch(6)
    ours, shares = mixed(x, targets, Mix(np.ones(6), no_boxes(6)))
    assert torch.equal(ours, x)
    assert torch.equal(shares, targets)


def test_pairs_mix_in_a_part_as_in_the_whole() -> None:
    x, targets = batch(21)
    mix = Mixing(mixup_prob=0.9, mixup=1.0, cutmix=1.0).draw(rng(), 21, 16, 12)
    ours, shares = mixed(x, targets, mix)
    for chosen in (slice(0, 8), slice(8, 14), slice(14, 21)):
        part, labels = mixed(x[chosen], targets[chosen], mix.part(chosen))
        assert torch.equal(part, ours[chosen])
        assert torch.equal(labels, shares[chosen])


def test_per_batch_all_images_have_one_weight_and_one_rectangle() -> None:
    kinds = set()
    for seed in range(40):
        mix = Mixing(mixup_prob=1.0, mixup=0.8, cutmix=1.0, mixup_mode="batch").draw(rng(seed), 9, 32, 32)
        assert mix.kept.shape == mix.cut.top.shape == (9,)
        for values in (mix.kept, mix.cut.top, mix.cut.left, mix.cut.bottom, mix.cut.right):
            assert len(set(values.tolist())) == 1
        kinds.add("mixup" if mix.kept[0] < 1 else "cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_per_image_every_image_has_a_weight_of_its_own() -> None:
    mix = Mixing(mixup_prob=1.0, mixup=0.8).draw(rng(), 200, 32, 32)
    assert len(set(mix.kept.tolist())) > 190


@sweep("alpha", [0.2, 0.8, 1.0])
def test_mixups_weight_is_beta_distributed_and_where_major_its_larger_half(alpha: float) -> None:
    n = 20_000
    kept = Mixing(mixup_prob=1.0, mixup=alpha).draw(rng(), n, 8, 8).kept
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    major = Mixing(mixup_prob=1.0, mixup=alpha, mix_major=True).draw(rng(), n, 8, 8).kept
    assert major.min() >= 0.5
    folded = stats.beta(alpha, alpha).rvs(n, random_state=1)
    assert farthest(major, np.maximum(folded, 1 - folded)) < 0.025


@sweep("prob", [0.0, 0.3, 0.5, 1.0])
@sweep("per", ["elem", "batch"])
def test_mixing_happens_with_its_probability_half_of_it_by_cutmix(prob: float, per: str) -> None:
    n = 8000 if per == "elem" else 2000
    mixing = Mixing(mixup_prob=prob, mixup=1.0, cutmix=1.0, mixup_mode=per)
    if per == "elem":
        mix = mixing.draw(rng(), n, 32, 32)
        by_mixup, by_cutmix = mix.kept < 1, area(mix.cut) > 0
    else:
        generator = rng()
        mixes = [mixing.draw(generator, 2, 32, 32) for _ in range(n)]
        by_mixup = np.array([mix.kept[0] < 1 for mix in mixes])
        by_cutmix = np.array([area(mix.cut)[0] > 0 for mix in mixes])
    assert not (by_mixup & by_cutmix).any()
    assert by_mixup.mean() == pytest.approx(prob / 2, abs=0.06)
    assert by_cutmix.mean() == pytest.approx(prob / 2, abs=0.06)


def test_with_one_alpha_0_the_other_does_all_the_mixing() -> None:
    only_mixup = Mixing(mixup_prob=1.0, mixup=1.0).draw(rng(), 1000, 32, 32)
    assert (only_mixup.kept < 1).all()
    assert not area(only_mixup.cut).any()
    only_cutmix = Mixing(mixup_prob=1.0, cutmix=1.0).draw(rng(), 1000, 32, 32)
    assert (only_cutmix.kept == 1).all()
    assert (area(only_cutmix.cut) > 0).mean() > 0.98
    neither = Mixing(mixup_prob=1.0).draw(rng(), 100, 32, 32)
    assert (neither.kept == 1).all()
    assert not area(neither.cut).any()


def test_mixing_is_off_without_a_probability_or_an_alpha() -> None:
    assert not Mixing()
    assert not Mixing(mixup_prob=1.0)
    assert not Mixing(mixup=1.0, cutmix=1.0)
    assert Mixing(mixup_prob=0.1, mixup=1.0)
    assert Mixing(mixup_prob=0.1, cutmix=1.0)


def test_rectangles_contain_the_pixels_between_their_edges() -> None:
    boxes = erasing_boxes(rng(), rng(1).random(50) < 0.8, 9, 14, (0.02, 0.4))
    inside = upload(boxes.spans(9, 14), CPU).mask
    assert inside.shape == (50, 1, 9, 14)
    for i in range(50):
        expected = torch.zeros(9, 14, dtype=torch.bool)
        expected[boxes.top[i] : boxes.bottom[i], boxes.left[i] : boxes.right[i]] = True
        assert torch.equal(inside[i, 0], expected)
    assert inside.any()
    assert not inside.flatten(1).any(1).all()


def test_rectangles_are_cut_and_repeated_as_the_images_are() -> None:
    boxes = crop_boxes(RectangleDraws.draw(rng(), 6), 32, 32, (0.1, 1.0))
    for name in ("top", "left", "bottom", "right"):
        values = getattr(boxes, name).tolist()
        assert getattr(boxes.part(slice(2, 4)), name).tolist() == values[2:4]
        assert getattr(boxes.part(np.array([5, 0])), name).tolist() == [values[5], values[0]]
        assert getattr(boxes.repeat(3), name).tolist() == values[:1] * 3


@sweep(("h", "w"), [(32, 32), (32, 24)])
@sweep("most", [0.4, 1 / 3])
def test_erased_rectangles_are_distributed_as_torchvisions(h: int, w: int, most: float) -> None:
    n = 4000
    boxes = erasing_boxes(rng(), np.ones(n, bool), h, w, (0.02, most))
    torch.manual_seed(0)
    image = torch.zeros(1, h, w)
    theirs = np.array([RandomErasing.get_params(image, (0.02, most), (0.3, 1 / 0.3), [0.0])[:4] for _ in range(n)])
    assert_alike(boxes, theirs)
    assert boxes.top.min() == 0
    assert boxes.bottom.max() == h
    assert boxes.right.max() == w


@sweep(("h", "w"), [(32, 32), (64, 64), (36, 32)])
@sweep("least", [0.05, 0.08, 0.5])
def test_crops_are_distributed_as_torchvisions(h: int, w: int, least: float) -> None:
    n = 4000
    boxes = crop_boxes(RectangleDraws.draw(rng(), n), h, w, (least, 1.0))
    torch.manual_seed(0)
    image = torch.zeros(1, h, w)
    theirs = np.array([RandomResizedCrop.get_params(image, [least, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    assert_alike(boxes, theirs)
    assert boxes.top.min() == boxes.left.min() == 0
    assert (boxes.bottom.max(), boxes.right.max()) == (h, w)


def assert_alike(boxes: Boxes, theirs: np.ndarray) -> None:
    """Places, sides, area and ratio have the distributions of `theirs`: top, left, height, width."""
    ours = np.stack([boxes.top, boxes.left, boxes.bottom - boxes.top, boxes.right - boxes.left], axis=1)
    quantiles = np.linspace(0.05, 0.95, 19)
    for column in range(4):
        assert farthest(ours[:, column], theirs[:, column]) < 0.045, column
        apart = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(apart).max() <= 2.0, column
    assert farthest(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < 0.045
    assert farthest(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]) < 0.045


def test_crops_that_fit_nowhere_are_the_whole_image() -> None:
    boxes = crop_boxes(RectangleDraws.draw(rng(), 50), 10, 40, (0.99, 1.0))
    assert (boxes.bottom - boxes.top == 10).all()
    assert (boxes.right - boxes.left == 40).all()


def test_crops_of_tiny_images_keep_a_pixel() -> None:
    boxes = crop_boxes(RectangleDraws.draw(rng(), 2000), 2, 2, (0.05, 1.0))
    assert (boxes.bottom - boxes.top).min() == 1
    assert (boxes.right - boxes.left).min() == 1


def test_erasing_happens_only_where_chosen() -> None:
    chosen = rng().random(2000) < 0.25
    boxes = erasing_boxes(rng(), chosen, 32, 32, (0.02, 0.4))
    assert np.array_equal(area(boxes) > 0, chosen)


def test_cutmix_rectangles_are_distributed_as_timms() -> None:
    n, h, w = 6000, 32, 24
    kept = rng(1).random(n)
    boxes = cutmix_boxes(rng(), np.ones(n, bool), kept, h, w)
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    theirs = np.array([rand_bbox((h, w), share) for share in kept])
    for column, ours in enumerate((boxes.top, boxes.bottom, boxes.left, boxes.right)):
        assert farthest(ours, theirs[:, column]) < 0.05
    assert farthest(area(boxes), (theirs[:, 1] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 2])) < 0.05


def test_cutmix_rectangles_cover_the_drawn_share_before_the_border_cuts_them() -> None:
    kept = rng(1).random(5000)
    boxes = cutmix_boxes(rng(), np.ones(5000, bool), kept, 64, 64)
    whole = (boxes.top > 0) & (boxes.left > 0) & (boxes.bottom < 64) & (boxes.right < 64)
    side = np.floor(64 * np.sqrt(1 - kept[whole]))
    assert whole.sum() > 500
    assert np.array_equal(area(boxes)[whole], side**2)
    assert not area(cutmix_boxes(rng(), np.zeros(50, bool), kept[:50], 64, 64)).any()


def keys(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(rng(seed).integers(-(2**63), 2**63, n))


def test_noise_follows_from_its_key_however_keys_are_batched() -> None:
    chosen = keys(12)
    whole = normal_noise(chosen, 3 * 8 * 8)
    assert torch.equal(normal_noise(chosen, 3 * 8 * 8), whole)
    order = torch.tensor([7, 3, 3, 11, 0])
    assert torch.equal(normal_noise(chosen[order], 3 * 8 * 8), whole[order])
    for i in range(12):
        assert torch.equal(normal_noise(chosen[i : i + 1], 3 * 8 * 8)[0], whole[i])
    assert len({tuple(row) for row in whole.tolist()}) == 12


@sweep("n", [1, 2, 7, 768])
def test_noise_has_as_many_values_as_asked_for(n: int) -> None:
    noise = normal_noise(keys(5), n)
    assert noise.shape == (5, n)
    assert noise.dtype == torch.float32
    assert normal_noise(keys(0), n).shape == (0, n)


def test_noise_is_made_of_splitmix64s_numbers_by_box_and_muller() -> None:
    noise = normal_noise(torch.tensor([1234567]), 10)[0].tolist()
    for i, bits in enumerate(SPLITMIX64):
        radius = math.sqrt(-2 * math.log(((bits >> 40) + 1) / 2**24))
        angle = 2 * math.pi * (bits % 2**24) / 2**24
        assert noise[i] == pytest.approx(radius * math.cos(angle), abs=1e-5)
        assert noise[i + 5] == pytest.approx(radius * math.sin(angle), abs=1e-5)


@sweep("consecutive", [False, True])
def test_noise_is_standard_normal(consecutive: bool) -> None:
    chosen = torch.arange(-500, 500) if consecutive else keys(1000)
    values = normal_noise(chosen, 1000).flatten().double().numpy()
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 5e-3
    assert abs(values.std() - 1) < 5e-3
    assert 4 < np.abs(values).max() < 5.8
    assert stats.kstest(values, "norm").pvalue > 1e-3
    counts = np.bincount(np.floor(stats.norm.cdf(values) * 200).astype(int), minlength=200)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kurtosis(values) == pytest.approx(0, abs=0.03)


@sweep("consecutive", [False, True])
def test_noise_is_not_correlated_between_keys_or_positions(consecutive: bool) -> None:
    n = 1000
    noise = normal_noise(torch.arange(n) if consecutive else keys(n), n).double().numpy()
    for values in (noise, np.square(noise)):
        for rows in (values, values.T):
            correlations = np.corrcoef(rows)[~np.eye(n, dtype=bool)]
            assert np.abs(correlations).max() < 7.5 / math.sqrt(n)
            assert correlations.std() * math.sqrt(n) == pytest.approx(1, abs=0.03)
    for lag in (1, 2, n // 2):  # half the length apart: the cosine and the sine of one angle
        assert abs(np.corrcoef(noise[:, lag:].ravel(), noise[:, :-lag].ravel())[0, 1]) < 0.006
