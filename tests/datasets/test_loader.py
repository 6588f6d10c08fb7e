"""TrainLoader from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from smallvit import datasets
from smallvit.config.options import AugmentConfig, DataConfig
from smallvit.datasets import loader as loaders
from smallvit.datasets.augment import Augment
from smallvit.datasets.dataset import ImageDataset, Images
from smallvit.datasets.loader import InMemoryLoader, evaluation_batches
from smallvit.datasets.presets import PRESETS
from tests.sweep import sweep

VARIED = ("none", "basic", "mix", "lee2021", "deit", "deit3", "augreg-medium2")
"""Presets with different operations."""

CPU = torch.device("cpu")
ODD = 41
"""A number of images of which no batch size makes equal batches."""


def digits(aug: str = "mix", batch_size: int = 100, seed: int = 0) -> InMemoryLoader:
    dataset = datasets.create_dataset(DataConfig())
    augment = Augment.from_config(AugmentConfig(aug=aug), dataset.img_size, dataset.flip)
    return InMemoryLoader(dataset, batch_size, augment, seed, CPU)


def noise(size: int, channels: int = 3, count: int = ODD) -> ImageDataset:
    """Images of noise in three classes."""
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(count) % 3)
    mean, std = images.channel_statistics()
    return ImageDataset(
        name="noise",
        source="noise",
        class_names=("a", "b", "c"),
        train=images,
        val=images.subset(np.arange(0)),
        test=images,
        mean=mean,
        std=std,
        flip=True,
        aug="mix",
        policy="imagenet",
        fingerprint="",
    )


def batches(dataset: ImageDataset, aug: str, **options: object) -> InMemoryLoader:
    augment = Augment.from_config(AugmentConfig(aug=aug), dataset.img_size, dataset.flip)
    return InMemoryLoader(dataset, options.pop("batch_size", 14), augment, options.pop("seed", 0), CPU, **options)


Batch = tuple[Tensor, Tensor]


def united(parts: list[Iterator[Batch]]) -> Iterator[Batch]:
    """Return the batches whose parts, in the order of ranks, these are."""
    for step in zip(*parts, strict=True):
        yield torch.cat([x for x, _ in step]), torch.cat([targets for _, targets in step])


def assert_same(ours: Iterator[Batch], expected: Iterator[Batch]) -> None:
    """Equal to the last bit."""
    compared = 0
    for (x, targets), (expected_x, expected_targets) in zip(ours, expected, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(targets, expected_targets)
        compared += len(x)
    assert compared


def test_an_epoch_holds_every_image_once_in_batches_of_equal_size() -> None:
    loader = digits("none", batch_size=37)  # 35 batches without a rest
    images, targets = zip(*loader.epoch(0), strict=True)
    assert len(images) == len(loader) == 35
    assert set(map(len, images)) == {37}
    everything = (loader.pixels.float() / 255 - loader.mean) / loader.std
    assert sorted(image.flatten().tolist() for image in torch.cat(images)) == sorted(everything.flatten(1).tolist())
    assert torch.cat(targets).argmax(1).bincount().tolist() == loader.labels.bincount().tolist()


def test_images_keep_their_labels() -> None:
    data = noise(8)
    label = {
        tuple(pixels.flatten().tolist()): int(y) for pixels, y in zip(data.train.pixels, data.train.labels, strict=True)
    }
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    for x, targets in batches(data, "none").epoch(0):
        for image, target in zip(x, targets, strict=True):
            pixels = ((image * std + mean) * 255).round().to(torch.uint8)
            assert target.tolist() == [float(label[tuple(pixels.flatten().tolist())] == k) for k in range(3)]


def test_alternate_flip_shows_both_sides_of_every_image_in_any_two_epochs() -> None:
    data = noise(8)
    mean, std = data.statistics(CPU)
    sides = {}
    for i, pixels in enumerate(data.train.pixels):
        sides[tuple(pixels.flatten().tolist())] = i, False
        sides[tuple(pixels.flip(-1).flatten().tolist())] = i, True

    def mirrored(epoch: int, **options: object) -> set[tuple[int, bool]]:
        augment = Augment.from_config(AugmentConfig(aug="none", flip=0.5, alternate_flip=True), 8, True)
        x = torch.cat([x for x, _ in InMemoryLoader(data, ODD, augment, 0, CPU, **options).epoch(epoch)])
        return {sides[tuple(((image * std + mean) * 255).round().byte().flatten().tolist())] for image in x}

    first, second, third = map(mirrored, range(3))
    assert first | second == set(sides.values())
    assert first == third
    assert 0.2 * ODD < sum(side for _, side in first) < 0.8 * ODD
    assert mirrored(0, rank=0, world=2) | mirrored(0, rank=1, world=2) == first


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    assert_same(digits().epoch(3), digits().epoch(3))


def test_epochs_and_seeds_differ() -> None:
    first = next(digits().epoch(0))[0]
    assert not torch.equal(first, next(digits().epoch(1))[0])
    assert not torch.equal(first, next(digits(seed=1).epoch(0))[0])


def test_a_batch_larger_than_the_data_is_one_step() -> None:
    loader = digits(batch_size=100_000)
    assert len(loader) == 1
    assert len(next(loader.epoch(0))[0]) == len(loader.labels)


def test_training_images_have_zero_mean_and_unit_variance() -> None:
    images = torch.cat([x for x, _ in digits("none", batch_size=37).epoch(0)])
    assert abs(images.mean().item()) < 1e-4
    assert abs(images.std().item() - 1) < 1e-3


@sweep("aug", VARIED)
@sweep("size", [16, 40])  # small images are padded, large ones cut and resized
def test_batches_are_the_same_however_many_devices_share_them(aug: str, size: int) -> None:
    data = noise(size)
    for world in (2, 3, 4):
        parts = [batches(data, aug, rank=rank, world=world).epoch(1) for rank in range(world)]
        assert_same(united(parts), batches(data, aug).epoch(1))


@sweep("aug", ["lee2021", "deit"])
def test_gray_images_are_shared_too(aug: str) -> None:
    data = noise(16, channels=1)
    parts = [batches(data, aug, rank=rank, world=2).epoch(0) for rank in range(2)]
    assert_same(united(parts), batches(data, aug).epoch(0))


def test_balanced_batches_are_shared_too() -> None:
    data = noise(8)
    data = replace(data, train=Images(data.train.pixels, (torch.arange(ODD) > 4).long()))
    parts = [batches(data, "mix", rank=rank, world=3, balanced=True).epoch(0) for rank in range(3)]
    assert_same(united(parts), batches(data, "mix", balanced=True).epoch(0))
    seen = torch.cat([targets for _, targets in batches(data, "none", balanced=True).epoch(0)]).sum(0)
    assert abs(seen[0] - seen[1]) <= 1


@sweep("aug", VARIED)
def test_devices_without_a_share_of_a_small_batch_get_an_empty_one(aug: str) -> None:
    data = noise(40, count=13)
    options = {"batch_size": 4}
    parts = [list(batches(data, aug, rank=rank, world=4, **options).epoch(0)) for rank in range(4)]
    assert any(not len(x) for part in parts for x, _ in part)
    assert_same(united([iter(part) for part in parts]), batches(data, aug, **options).epoch(0))


@sweep("aug", VARIED)
@sweep("start", [0, 1, 2, 3])
def test_an_epoch_can_be_entered_anywhere(aug: str, start: int) -> None:
    data = noise(40)
    whole = list(batches(data, aug, batch_size=10).epoch(2))
    assert len(whole) > 3
    assert_same(batches(data, aug, batch_size=10).epoch(2, start=start), iter(whole[start:]))


def test_nothing_is_left_after_the_last_step() -> None:
    loader = batches(noise(8), "mix")
    assert list(loader.epoch(0, start=len(loader))) == []


def test_entering_an_epoch_draws_nothing_from_the_global_generators() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches(noise(40), "deit").epoch(0))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_the_images_in_memory_are_not_changed() -> None:
    data = noise(40)
    before = data.train.pixels.clone()
    for aug in PRESETS:
        list(batches(data, aug).epoch(0))
    assert torch.equal(data.train.pixels, before)


@sweep("batch_size", [1, 64, 10_000])
def test_evaluation_goes_through_a_split_in_order(batch_size: int) -> None:
    dataset = datasets.create_dataset(DataConfig())
    images, labels = zip(*evaluation_batches(dataset, "test", CPU, batch_size), strict=True)
    assert torch.equal(torch.cat(labels), dataset.test.labels)
    expected = (dataset.test.pixels.double() / 255 - dataset.mean[0]) / dataset.std[0]
    torch.testing.assert_close(torch.cat(images), expected.float())
    assert max(map(len, images)) <= batch_size


def test_images_that_would_fill_the_device_are_copied_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(30)
    expected = list(batches(data, "lee2021").epoch(0))
    monkeypatch.setattr(loaders, "free_memory", lambda device: 1.0)
    meta = InMemoryLoader(data, 8, Augment(), 0, torch.device("meta"))
    assert meta.pixels.device.type == "cpu"  # elsewhere than the device
    for (x, y), (x_, y_) in zip(batches(data, "lee2021").epoch(0), expected, strict=True):
        assert torch.equal(x, x_)
        assert torch.equal(y, y_)
