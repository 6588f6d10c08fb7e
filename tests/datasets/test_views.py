"""Test the views of images: sizes, areas, independence of batches and processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from smallvit import InputError
from smallvit.config.options import PretrainConfig
from smallvit.datasets.views import ViewMaker, Views

MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


def maker(size: int = 32, local: int = 16, **options: object) -> ViewMaker:
    return ViewMaker.from_config(PretrainConfig(objective="lejepa", **options), size, 0.5, local)


def pixels(b: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(views: ViewMaker, images: Tensor, seed: int = 0) -> Views:
    draws = views.draw(np.random.default_rng(seed), len(images), *images.shape[-2:])
    return views.apply(images, torch.zeros(len(images), dtype=torch.int64), draws, MEAN, STD)[0]


def test_views_have_their_number_and_size() -> None:
    made = make(maker(global_views=3, local_views=5), pixels(4))
    assert [tuple(group.shape) for group in made.groups] == [(4, 3, 3, 32, 32), (4, 5, 3, 16, 16)]
    assert len(made) == 4
    assert len(make(maker(local_views=0), pixels(4)).groups) == 1


def test_views_of_an_image_differ_and_follow_from_the_seed() -> None:
    views, images = maker(), pixels(4)
    one, same, other = (make(views, images, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.groups, same.groups, strict=True))
    assert one.seed == same.seed != other.seed
    assert not torch.equal(one.groups[0], other.groups[0])
    assert not torch.equal(one.groups[0][:, 0], one.groups[0][:, 1])


def test_images_are_not_changed() -> None:
    images = pixels(4)
    before = images.clone()
    make(maker(), images)
    assert torch.equal(images, before)


def test_a_part_of_a_batch_has_the_views_that_it_has_in_the_batch() -> None:
    views, images = maker(64, 32), pixels(6, 64)
    draws = views.draw(np.random.default_rng(0), 6, 64, 64)
    labels = torch.zeros(6, dtype=torch.int64)
    whole, _ = views.apply(images, labels, draws, MEAN, STD)
    part, _ = views.apply(images[2:4], labels[2:4], draws.part(slice(2, 4)), MEAN, STD)
    assert part.seed == whole.seed
    for ours, expected in zip(part.groups, whole.groups, strict=True):
        torch.testing.assert_close(ours, expected[2:4], atol=1.01 / 255 / 0.25, rtol=0)  # sums may round differently
    halves = whole.tensor_split(2)
    assert [len(half) for half in halves] == [3, 3]
    assert torch.equal(torch.cat([half.groups[1] for half in halves]), whole.groups[1])


def test_crops_have_the_areas_of_their_kind() -> None:
    views = maker(32, 16, global_scale=0.6, local_scale=0.1, local_scale_max=0.3)
    draws = views.draw(np.random.default_rng(0), 2000, 32, 32)
    for group, (least, most) in zip(draws.views, ((0.6, 1.0), (0.1, 0.3)), strict=True):
        for each in group:
            area = (each.crop.bottom - each.crop.top) * (each.crop.right - each.crop.left) / 32**2
            assert least - 0.05 < area.min() < area.max() <= most + 0.05


def test_a_resized_crop_of_another_size_is_that_of_torchvision() -> None:
    from torchvision.transforms.v2 import functional as V

    from smallvit.datasets.functional import resized_crop

    images = pixels(2)
    edges = [torch.tensor(values) for values in ([3, 0], [5, 2], [20, 31], [17, 30])]
    ours = resized_crop(images, *edges, size=(8, 12))
    for index, (top, left, height, width) in enumerate(zip(*(each.tolist() for each in edges), strict=True)):
        expected = V.resized_crop(images[index], top, left, height, width, [8, 12], antialias=True)
        assert (ours[index].int() - expected.int()).abs().max() <= 1


def test_reversed_scales_and_single_views_are_refused() -> None:
    with pytest.raises(InputError, match=r"--local-scale 0\.9: expected at most --local-scale-max 0\.5"):
        maker(local_scale=0.9)
    with pytest.raises(InputError, match="expected at least 2 views"):
        maker(global_views=1, local_views=0)
