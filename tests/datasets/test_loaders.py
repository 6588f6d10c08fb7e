"""Batches from memory."""

from __future__ import annotations

import torch

from smallvit import datasets
from smallvit.config import AugmentConfig, DataConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.loaders import TrainingBatches, evaluation_batches

CPU = torch.device("cpu")


def batches(aug: str = "mix", batch_size: int = 100, seed: int = 0) -> TrainingBatches:
    dataset = datasets.load(DataConfig())
    augment = Augment.from_config(AugmentConfig(aug=aug), dataset.img_size, dataset.flip)
    return TrainingBatches(dataset, batch_size, augment, seed, CPU)


def test_an_epoch_holds_every_image_once_in_batches_of_equal_size() -> None:
    loader = batches("none")
    images, targets = zip(*loader.epoch(0), strict=True)
    assert len(images) == len(loader) == -(-len(loader.labels) // 100)
    assert max(map(len, images)) - min(map(len, images)) <= 1
    assert max(map(len, images)) <= 100
    seen = sorted(tuple(image.flatten().tolist()) for x in images for image in x)
    everything = next(iter(evaluation_all(loader)))
    assert seen == sorted(tuple(image.flatten().tolist()) for image in everything)
    assert torch.cat(targets).argmax(1).bincount().tolist() == loader.labels.bincount().tolist()


def evaluation_all(loader: TrainingBatches) -> list[torch.Tensor]:
    return [(loader.pixels.float() / 255 - loader.mean) / loader.std]


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    for (a, ta), (b, tb) in zip(batches().epoch(3), batches().epoch(3), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ta, tb)


def test_epochs_and_seeds_differ() -> None:
    first = next(batches().epoch(0))[0]
    assert not torch.equal(first, next(batches().epoch(1))[0])
    assert not torch.equal(first, next(batches(seed=1).epoch(0))[0])


def test_a_batch_larger_than_the_data_is_one_step() -> None:
    loader = batches(batch_size=100_000)
    assert len(loader) == 1
    assert len(next(loader.epoch(0))[0]) == len(loader.labels)


def test_training_images_have_zero_mean_and_unit_variance() -> None:
    images = torch.cat([x for x, _ in batches("none").epoch(0)])
    assert abs(images.mean().item()) < 1e-4
    assert abs(images.std().item() - 1) < 1e-3


def test_evaluation_goes_through_a_split_in_order() -> None:
    dataset = datasets.load(DataConfig())
    images, labels = zip(*evaluation_batches(dataset, "test", CPU, 64), strict=True)
    assert torch.equal(torch.cat(labels), dataset.test.labels)
    expected = (dataset.test.pixels.double() / 255 - dataset.mean[0]) / dataset.std[0]
    torch.testing.assert_close(torch.cat(images), expected.float())
