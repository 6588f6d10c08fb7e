"""Common corruptions: what they do to photographs, and what they leave."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import Tensor

from smallvit.datasets.functional import CORRUPTIONS, STRENGTHS, corrupt
from tests.sweep import sweep

KEYS = torch.arange(2)


@pytest.fixture(scope="module", params=[(3, 64), (1, 28)])
def photos(request: pytest.FixtureRequest) -> Tensor:
    """scikit-learn's two photographs: (2, c, s, s)."""
    channels, size = request.param
    images = [Image.fromarray(photo).resize((size, size)) for photo in load_sample_images().images]
    arrays = [np.asarray(image if channels == 3 else image.convert("L")).reshape(size, size, -1) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def damage(before: Tensor, after: Tensor) -> float:
    return float((before.float() - after.float()).square().mean())


@sweep("kind", CORRUPTIONS)
def test_damage_grows_with_strength_and_images_stay_images(photos: Tensor, kind: str) -> None:
    spoilt = [corrupt(photos, kind, strength, KEYS) for strength in STRENGTHS]
    assert all(each.dtype == torch.uint8 and each.shape == photos.shape for each in spoilt)
    one, two, three = (damage(photos, each) for each in spoilt)
    assert 0 < one < two < three


@sweep("kind", CORRUPTIONS)
def test_images_are_spoilt_the_same_each_time_in_any_batch(photos: Tensor, kind: str) -> None:
    together = corrupt(photos, kind, 2, KEYS)
    apart = torch.cat([corrupt(photos[[at]], kind, 2, KEYS[[at]]) for at in range(2)])
    assert torch.equal(together, apart)
    assert torch.equal(together, corrupt(photos, kind, 2, KEYS))


@sweep("kind", CORRUPTIONS)
def test_a_gray_area_stays_as_it_is_but_for_noise(kind: str) -> None:
    gray = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    spoilt = corrupt(gray, kind, 3, KEYS)
    assert torch.equal(spoilt, gray) == (kind != "noise")


def test_noise_is_normal_and_of_its_deviation_and_another_for_each_key() -> None:
    gray = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    spoilt = corrupt(gray, "noise", 2, KEYS).double() - 128
    for image in spoilt:
        assert float(image.std()) == pytest.approx(0.08 * 255, rel=0.03)
        assert abs(float(image.mean())) < 1
        assert float((image.abs() > 1.96 * 0.08 * 255).double().mean()) == pytest.approx(0.05, abs=0.01)
    assert abs(float(np.corrcoef(spoilt.flatten(1))[0, 1])) < 0.05


@sweep(("strength", "width"), [(1, 0.015), (2, 0.03), (3, 0.06)])
def test_blur_is_scipys(photos: Tensor, strength: int, width: float) -> None:
    sigma = width * photos.shape[-1]
    expected = gaussian_filter(photos.double().numpy(), (0, 0, sigma, sigma), mode="mirror")
    blurred = corrupt(photos, "blur", strength, KEYS).double().numpy()
    assert np.abs(blurred - expected).max() < 0.75 + 0.01 * (sigma < 0.5) * 255  # rounding; the tail of narrow ones


def test_blur_is_as_wide_in_relation_to_a_larger_image(photos: Tensor) -> None:
    larger = photos.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    spoilt = corrupt(larger, "blur", 3, KEYS).float()
    smaller = torch.nn.functional.avg_pool2d(spoilt, 2)
    assert damage(smaller, corrupt(photos, "blur", 3, KEYS)) < 0.02 * damage(photos, smaller)


def test_contrast_is_scaled_around_the_mean_gray_level(photos: Tensor) -> None:
    before = photos.double()
    weights = torch.tensor([0.2989, 0.587, 0.114] if photos.shape[1] == 3 else [1.0]).double()
    mean = torch.einsum("bchw,c->b", before, weights)[:, None, None, None] / before[0, 0].numel()
    reduced = corrupt(photos, "contrast", 2, KEYS).double()
    assert (reduced - (mean + 0.3 * (before - mean))).abs().max() < 0.6


@sweep(("strength", "quality"), [(1, 50), (3, 10)])
def test_jpeg_is_pillows(photos: Tensor, strength: int, quality: int) -> None:
    spoilt = corrupt(photos, "jpeg", strength, KEYS)
    for before, after in zip(photos, spoilt, strict=True):
        file = io.BytesIO()
        mode = "RGB" if len(before) == 3 else "L"
        Image.fromarray(before.permute(1, 2, 0).squeeze(-1).numpy(), mode).save(file, "jpeg", quality=quality)
        expected = np.asarray(Image.open(file)).reshape(*before.shape[1:], -1).transpose(2, 0, 1)
        assert np.array_equal(after.numpy(), expected)


def test_images_of_a_single_pixel_survive_all() -> None:
    dots = torch.tensor([10, 250], dtype=torch.uint8).view(2, 1, 1, 1)
    for kind in CORRUPTIONS:
        assert corrupt(dots, kind, 3, KEYS).shape == dots.shape
