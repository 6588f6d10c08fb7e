"""Image operations against torchvision's, one image at a time, and against their equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torchvision.transforms import InterpolationMode

from smallvit.datasets.augment import crop_and_flip, crop_indices
from smallvit.datasets.functional import (
    BLENDS,
    GEOMETRY,
    TABLES,
    affine_maps,
    apply_operations,
    resize_weights,
    resized_crop,
    to_gray,
    warp,
)
from smallvit.datasets.upload import upload
from tests.sweep import sweep

SHAPES = [(3, 32, 32), (3, 24, 40), (1, 32, 32), (1, 24, 40), (3, 64, 64)]
NAMES = ("Identity", *TABLES, *BLENDS, *GEOMETRY)


@cache
def pictures(c: int, h: int, w: int) -> Tensor:
    """Crops of two photographs, smooth noise, and edge cases: constant, of two levels, of neighboring levels."""
    generator = torch.Generator().manual_seed(0)
    crops = []
    for photo in load_sample_images().images:
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        for top, left, zoom in ((0, 0, 1), (200, 300, 1), (100, 50, 3), (30, 200, 5), (250, 100, 2)):
            crops.append(V.resize(V.crop(pixels, top, left, h * zoom, w * zoom), [h, w], antialias=True))
    photos = torch.stack(crops)
    low = F.interpolate(torch.rand(10, 3, 4, 4, generator=generator), (h, w), mode="bicubic")
    smooth = ((low + 0.05 * torch.randn(10, 3, h, w, generator=generator)).clamp(0, 1) * 255).byte()
    constant = torch.tensor([0, 77, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, h, w)
    split = torch.where(smooth[:2] > 128, 201, 30).byte()
    close = 99 + (smooth[2:4] > 100).byte()
    return torch.cat([photos, smooth, constant, split, close])[:, :c].contiguous()


def affine(image: Tensor, shear: tuple[float, float] = (0.0, 0.0), translate: tuple[int, int] = (0, 0)) -> Tensor:
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    return V.affine(image, 0.0, list(translate), 1.0, degrees, fill=0, center=[0, 0] if any(shear) else None)


ORACLES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, float]]] = {
    "ShearX": (lambda image, m: affine(image, shear=(m, 0)), (-1, 1)),
    "ShearY": (lambda image, m: affine(image, shear=(0, m)), (-1, 1)),
    "TranslateX": (lambda image, m: affine(image, translate=(int(m), 0)), (-45, 45)),
    "TranslateY": (lambda image, m: affine(image, translate=(0, int(m))), (-45, 45)),
    "Rotate": (lambda image, m: V.rotate(image, m, fill=0), (-135, 135)),
    "Brightness": (V.adjust_brightness, (0, 2.8)),
    "Contrast": (V.adjust_contrast, (0, 2.8)),
    "Color": (V.adjust_saturation, (0, 2.8)),
    "Sharpness": (V.adjust_sharpness, (0, 2.8)),
    "Posterize": (lambda image, m: V.posterize(image, int(m)), (0, 8.99)),
    "Solarize": (V.solarize, (0, 255)),
    "AutoContrast": (lambda image, _: V.autocontrast(image), (0, 0)),
    "Equalize": (lambda image, _: V.equalize(image), (0, 0)),
    "Invert": (lambda image, _: V.invert(image), (0, 0)),
    "Grayscale": (lambda image, _: V.rgb_to_grayscale(image, num_output_channels=len(image)), (0, 0)),
    "GaussianBlur": (lambda image, m: V.gaussian_blur(image, [17, 17], [m, m]), (0.1, 2)),
}
"""Torchvision's functions, and the range of strengths that they are compared over."""


def strengths(name: str, n: int, seed: int = 0) -> np.ndarray:
    low, high = ORACLES[name][1] if name in ORACLES else (0, 60)
    return np.random.default_rng(seed).uniform(low, high, n)


def difference(ours: Tensor, theirs: Tensor) -> int:
    return int((ours.int() - theirs.int()).abs().max())


def test_every_operation_but_two_has_an_oracle() -> None:
    assert set(NAMES) - set(ORACLES) == {"Identity", "SolarizeAdd"}
    assert set(ORACLES) <= set(NAMES)


@sweep("shape", SHAPES)
@sweep("name", ORACLES)
def test_operations_equal_torchvisions_to_one_gray_level(name: str, shape: tuple[int, int, int]) -> None:
    images = pictures(*shape)
    amounts = strengths(name, len(images))
    expected = torch.stack([ORACLES[name][0](image, float(m)) for image, m in zip(images, amounts, strict=True)])
    ours = apply_operations(images.clone(), [name] * len(images), amounts)
    assert ours.dtype == torch.uint8
    assert difference(ours, expected) <= 1
    if name != "AutoContrast":  # whose largest level comes out as 254 there, one less than Pillow's and the equation's
        assert (ours != expected).float().mean() < 0.005
    if name not in ("Color", "Grayscale") or shape[0] == 3:
        assert not torch.equal(ours, images)


@sweep("name", ["Invert", "Posterize", "Solarize", "Equalize", *GEOMETRY])
def test_operations_without_rounding_equal_torchvisions_exactly(name: str) -> None:
    images = pictures(3, 32, 32)
    amounts = strengths(name, len(images), seed=1)
    expected = torch.stack([ORACLES[name][0](image, float(m)) for image, m in zip(images, amounts, strict=True)])
    assert torch.equal(apply_operations(images.clone(), [name] * len(images), amounts), expected)


@sweep(
    ("name", "values"),
    [
        ("Rotate", [0, 180, -180, 90, -90, 45, 30, -135, 360]),
        ("Posterize", range(9)),
        ("Solarize", [0, 1, 127, 128, 255]),
        ("Brightness", [0, 1]),
        ("Contrast", [0, 1]),
        ("Color", [0, 1]),
        ("Sharpness", [0, 1]),
        ("ShearX", [0, 0.3, -0.3]),
        ("ShearY", [0, 0.3, -0.3]),
        ("TranslateX", [0, 31, -31, 32, -32, 500]),
        ("TranslateY", [0, 31, -31, 32, -32, 500]),
        ("GaussianBlur", [0.1, 2]),
    ],
)
def test_operations_equal_torchvisions_at_the_ends_of_their_ranges(name: str, values: list[float]) -> None:
    for value in values:
        images = pictures(3, 32, 32)
        expected = torch.stack([ORACLES[name][0](image, value) for image in images])
        assert (
            difference(apply_operations(images.clone(), [name] * len(images), np.full(len(images), value)), expected)
            <= 1
        )


@sweep("sign", [1, -1])
@sweep("name", GEOMETRY)
def test_geometry_equals_torchvisions_at_every_strength_that_policies_draw(name: str, sign: int) -> None:
    most = {"Rotate": (30, 135), "ShearX": (0.3, 0.99), "ShearY": (0.3, 0.99)}.get(name, (150 / 331 * 32, 32))
    values = sign * np.concatenate([np.linspace(0, most[0], 10), np.linspace(0, most[1], 31)])
    image = pictures(3, 32, 32)[0]
    expected = torch.stack([ORACLES[name][0](image, float(value)) for value in values])
    ours = apply_operations(image.repeat(len(values), 1, 1, 1), [name] * len(values), values)
    position = torch.from_numpy(values)[:, None] * (torch.arange(32) + 0.5)  # how far a shear fetches a row or column
    tie = ((position % 1 - 0.5).abs() < 1e-4) & name.startswith("Shear")  # halfway between two pixels: either will do
    tie = tie[:, None, :, None] if name == "ShearX" else tie[:, None, None, :]
    assert tie.float().mean() < 0.02
    assert torch.equal(ours.masked_fill(tie, 0), expected.masked_fill(tie, 0))


@sweep(
    ("name", "pillows"),
    [
        ("Brightness", lambda image, m: ImageEnhance.Brightness(image).enhance(m)),
        ("Sharpness", lambda image, m: ImageEnhance.Sharpness(image).enhance(m)),
        ("Posterize", lambda image, m: ImageOps.posterize(image, int(m)) if m < 8 else image),
        ("Solarize", lambda image, m: ImageOps.solarize(image, math.ceil(m))),
        ("AutoContrast", lambda image, _: ImageOps.autocontrast(image)),
        ("Equalize", lambda image, _: ImageOps.equalize(image)),
        ("Invert", lambda image, _: ImageOps.invert(image)),
    ],
)
def test_color_operations_equal_pillows_to_one_gray_level(name: str, pillows: Callable[..., Image.Image]) -> None:
    images = pictures(3, 32, 32)
    amounts = np.maximum(1, strengths(name, len(images))) if name == "Posterize" else strengths(name, len(images))
    ours = apply_operations(images.clone(), [name] * len(images), amounts)
    for image, amount, mine in zip(images, amounts, ours, strict=True):
        theirs = pillows(Image.fromarray(image.permute(1, 2, 0).numpy()), float(amount))
        assert difference(mine, torch.from_numpy(np.array(theirs)).permute(2, 0, 1)) <= 1


def test_solarize_add_raises_the_dark_half_alone() -> None:
    images = pictures(3, 24, 40)
    amounts = np.arange(len(images)) * 10.0 + 0.5
    ours = apply_operations(images.clone(), ["SolarizeAdd"] * len(images), amounts).int()
    for image, amount, mine in zip(images.int(), amounts, ours, strict=True):
        raised = (image + int(amount)).clamp(max=255)
        assert torch.equal(mine, torch.where(image < 128, raised, image))


def test_autocontrast_stretches_each_channel_from_0_to_255() -> None:
    images = pictures(3, 32, 32)
    ours = apply_operations(images.clone(), ["AutoContrast"] * len(images), np.zeros(len(images)))
    pixels = images.flatten(2).double()
    least, most = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    varied = (most > least)[..., 0]
    assert 0 < varied.float().mean() < 1
    assert torch.equal(ours[~varied], images[~varied])
    assert (ours.flatten(2).amin(2)[varied] == 0).all()
    assert (ours.flatten(2).amax(2)[varied] >= 254).all()
    exact = ((pixels - least) * 255 / (most - least))[varied]
    assert (ours.flatten(2)[varied].double() - exact.floor()).abs().max() <= 1
    assert (ours.flatten(2)[varied].double() != exact.floor()).double().mean() < 0.005


def test_solarize_above_the_brightest_level_changes_nothing() -> None:
    images = pictures(3, 32, 32)
    assert torch.equal(
        apply_operations(images.clone(), ["Solarize"] * len(images), np.full(len(images), 256.0)), images
    )


@sweep("shape", SHAPES[:3])
def test_a_batch_of_mixed_operations_equals_each_image_done_alone(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    names = rng.permutation(np.tile(NAMES, 6))
    images = pictures(*shape).repeat(math.ceil(len(names) / len(pictures(*shape))), 1, 1, 1)[: len(names)]
    amounts = np.array([strengths(str(name), 1, seed=i)[0] for i, name in enumerate(names)])
    together = apply_operations(images.clone(), names, amounts, fill=128)
    for i, name in enumerate(names):
        alone = apply_operations(images[i : i + 1].clone(), [str(name)], amounts[i : i + 1], fill=128)
        assert torch.equal(together[i : i + 1], alone), name
        if name in ORACLES and name not in GEOMETRY:
            assert difference(alone[0], ORACLES[name][0](images[i], float(amounts[i]))) <= 1


def test_identity_changes_nothing() -> None:
    images = pictures(3, 32, 32)
    assert torch.equal(apply_operations(images.clone(), ["Identity"] * len(images), np.full(len(images), 0.7)), images)


@sweep("name", NAMES)
def test_operations_work_inplace_and_keep_images_of_identity(name: str) -> None:
    images = pictures(3, 32, 32)[:6]
    given = images.clone()
    names = [name, "Identity"] * 3
    result = apply_operations(given, names, np.array([strengths(name, 1)[0]] * 6))
    assert result.data_ptr() == given.data_ptr()
    assert result.dtype == torch.uint8
    assert not result.requires_grad
    assert torch.equal(result[1::2], images[1::2])
    assert (name == "Identity") == torch.equal(result, images)


@sweep("fill", [0, 128, 255])
@sweep("name", GEOMETRY)
def test_what_comes_from_outside_has_the_fills_color(name: str, fill: int) -> None:
    h, w = 24, 40
    image = torch.full((1, 3, h, w), 77, dtype=torch.uint8)
    amount = {"Rotate": 45.0, "ShearX": 0.5, "ShearY": 0.5}.get(name, 10.0)
    ours = apply_operations(image.clone(), [name], np.array([amount]), fill=fill)
    black = apply_operations(image.clone(), [name], np.array([amount]))
    assert torch.equal(ours == fill, black == 0)
    assert set(ours.flatten().tolist()) == {77, fill}
    if name.startswith("Translate"):
        new = ours[0, :, :, :10] if name == "TranslateX" else ours[0, :, :10]
        assert (new == fill).all()
        assert (ours == fill).sum() == new.numel()


@sweep("shape", SHAPES)
@sweep("name", GEOMETRY)
def test_bicubic_geometry_equals_pillows_as_timm_calls_it(name: str, shape: tuple[int, int, int]) -> None:
    """Fractions of pixels, and a fill per channel; `timm.data.auto_augment` takes the image and the strength."""
    images = pictures(*shape)
    h, w = shape[1:]
    most = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45 * w, "TranslateY": 0.45 * h}[name]
    amounts = np.random.default_rng(0).uniform(-most, most, len(images))
    fill = (124, 116, 104)[: shape[0]]
    call = {
        "Rotate": timm_ops.rotate,
        "ShearX": timm_ops.shear_x,
        "ShearY": timm_ops.shear_y,
        "TranslateX": lambda image, m, **options: timm_ops.translate_x_abs(image, -m, **options),
        "TranslateY": lambda image, m, **options: timm_ops.translate_y_abs(image, -m, **options),
    }[name]
    color = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
    ours = apply_operations(images.clone(), [name] * len(images), amounts, fill=color, bicubic=True)
    for image, amount, mine in zip(images, amounts, ours, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
        options = {"resample": Image.Resampling.BICUBIC, "fillcolor": fill if len(fill) > 1 else fill[0]}
        theirs = torch.from_numpy(np.array(call(picture, float(amount), **options)).reshape(h, w, -1)).movedim(-1, 0)
        assert difference(mine, theirs) <= 1
        assert (mine != theirs).float().mean() < 0.01


def test_rotations_turn_counter_clockwise_around_the_center() -> None:
    image = pictures(3, 32, 32)[:1]
    assert torch.equal(apply_operations(image.clone(), ["Rotate"], np.array([90.0])), image.rot90(1, (2, 3)))


def test_warp_by_the_identity_returns_the_image_and_half_pixels_stay_within_it() -> None:
    images = pictures(3, 24, 40)
    same = torch.tensor([[1.0, 0, 19.5], [0, 1, 11.5]]).expand(len(images), 2, 3)  # from the center
    assert torch.equal(warp(images, same, fill=9), images)
    moved = same + torch.tensor([[0, 0, 0.4], [0, 0, -0.4]])
    assert torch.equal(warp(images, moved, fill=9), images)


@sweep("name", ["ShearX", "ShearY"])
def test_shears_leave_the_upper_left_corner_where_it_is(name: str) -> None:
    h, w = 24, 40
    corner = np.array([-w / 2, -h / 2, 1.0])
    for matrix in affine_maps(name, np.array([-0.7, 0.2, 1.0]), h, w):
        np.testing.assert_allclose(matrix @ corner, corner[:2], atol=1e-12)


@sweep(("h", "w"), [(1, 1), (2, 2), (3, 2), (5, 9)])
@sweep("name", NAMES)
def test_operations_work_on_tiny_images(name: str, h: int, w: int) -> None:
    images = torch.randint(0, 256, (4, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    amounts = strengths(name, 4)
    ours = apply_operations(images.clone(), [name] * 4, amounts)
    assert ours.shape == images.shape
    if name in ("GaussianBlur", "Identity", "SolarizeAdd"):
        return
    expected = torch.stack([ORACLES[name][0](image, float(m)) for image, m in zip(images, amounts, strict=True)])
    assert difference(ours, expected) <= 1


def test_blur_keeps_to_the_mirrored_edge_that_small_images_have() -> None:
    images = torch.randint(0, 256, (4, 3, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = apply_operations(images.clone(), ["GaussianBlur"] * 4, np.full(4, 1.5))
    expected = torch.stack([V.gaussian_blur(image, [11, 11], [1.5, 1.5]) for image in images])
    assert difference(ours, expected) <= 1


def test_gray_is_the_weighted_sum_of_the_colors_and_of_one_channel_itself() -> None:
    images = pictures(3, 32, 32)
    expected = np.einsum("bchw,c->bhw", images.double().numpy(), [0.2989, 0.587, 0.114])
    assert np.abs(to_gray(images)[:, 0].numpy() - np.floor(expected + 1e-4)).max() <= 1
    assert torch.equal(to_gray(images[:, :1]), images[:, :1].float())


@sweep("shape", SHAPES[:3])
@sweep(("padding", "mode"), [(0, "constant"), (4, "constant"), (4, "reflect"), (13, "reflect")])
def test_padded_crops_and_flips_equal_torchvisions(shape: tuple[int, int, int], padding: int, mode: str) -> None:
    images = pictures(*shape)
    b, (h, w) = len(images), images.shape[-2:]
    rng = np.random.default_rng(0)
    top, left = rng.integers(0, 2 * padding + 1, (2, b))
    top[:2], left[:2] = (0, 2 * padding), (2 * padding, 0)
    flip = rng.random(b) < 0.5
    indices = crop_indices(h, w, padding, top, left, flip, mirror=mode == "reflect")
    ours = crop_and_flip(images, upload(indices, images.device))
    for image, y, x, mirrored, mine in zip(images, top, left, flip, ours, strict=True):
        expected = V.crop(V.pad(image, [padding], padding_mode=mode), int(y), int(x), h, w)
        assert torch.equal(mine, V.horizontal_flip(expected) if mirrored else expected)


@sweep("shape", SHAPES)
def test_resized_crops_equal_torchvisions_to_one_gray_level(shape: tuple[int, int, int]) -> None:
    images = pictures(*shape).repeat(3, 1, 1, 1)
    b, (h, w) = len(images), images.shape[-2:]
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, h + 1, b), rng.integers(1, w + 1, b)
    height[:4], width[:4] = (h, h, 1, 1), (w, 1, w, 1)
    top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
    ours = resized_crop(images, *map(torch.from_numpy, (top, left, height, width)))
    assert ours.dtype == torch.uint8
    assert torch.equal(ours[0], images[0])
    for image, box, mine in zip(images, np.stack([top, left, height, width], axis=1).tolist(), ours, strict=True):
        expected = V.resized_crop(image, *box, [h, w], interpolation=InterpolationMode.BILINEAR, antialias=True)
        assert difference(mine, expected) <= 1


@sweep("shape", SHAPES)
def test_bicubic_crops_equal_pillows_to_one_gray_level(shape: tuple[int, int, int]) -> None:
    images = pictures(*shape)
    b, (h, w) = len(images), images.shape[-2:]
    rng = np.random.default_rng(0)
    height, width = rng.integers(2, h + 1, b), rng.integers(2, w + 1, b)
    height[:2], width[:2] = h, w
    top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
    ours = resized_crop(images, *map(torch.from_numpy, (top, left, height, width)), bicubic=True)
    assert torch.equal(ours[0], images[0])
    for image, y, x, rows, columns, mine in zip(images, top, left, height, width, ours, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).crop((x, y, x + columns, y + rows))
        theirs = np.array(picture.resize((w, h), Image.Resampling.BICUBIC)).reshape(h, w, -1)
        assert difference(mine, torch.from_numpy(theirs).movedim(-1, 0)) <= 1


@sweep(("into", "of"), [(8, 32), (13, 40), (40, 13), (32, 32), (1, 9)])
def test_resizing_weights_equal_torchs_antialiased_bilinear_ones(into: int, of: int) -> None:
    ours = resize_weights(torch.zeros(1), torch.tensor([float(of)]), into, of)[0]
    pixels = torch.eye(of)[:, None, None, :]  # an image per pixel, of that pixel alone
    expected = F.interpolate(pixels, (1, into), mode="bilinear", antialias=True)[:, 0, 0].T
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_resizing_weights_of_a_part_are_those_of_the_part_alone_and_0_elsewhere() -> None:
    start, length = torch.tensor([3.0, 0.0, 20.0]), torch.tensor([10.0, 1.0, 12.0])
    ours = resize_weights(start, length, 16, 32)
    for weights, first, count in zip(ours, start.int().tolist(), length.int().tolist(), strict=True):
        alone = resize_weights(torch.zeros(1), torch.tensor([float(count)]), 16, count)[0]
        torch.testing.assert_close(weights[:, first : first + count], alone)
        assert weights.sum(1).sub(1).abs().max() < 1e-6
        assert weights[:, :first].eq(0).all()
        assert weights[:, first + count :].eq(0).all()
