"""Test the images of each batch, counted by hand over many sizes."""

from __future__ import annotations

import itertools

import numpy as np

from smallvit.datasets.loader import Sampling, balanced_order, rank_slice, repeat_pairs
from tests.sweep import sweep

SIZES = [(1, 1), (2, 1), (7, 3), (10, 10), (10, 11), (64, 8), (101, 25), (103, 1000)]
"""Images, and images per batch at most."""
SKEWED = {
    "even": [10, 10, 10],
    "one of each": [1, 1, 1, 1],
    "one small class": [97, 1, 40],
    "very skewed": [1000, 3, 2, 1, 7],
    "many classes": list(range(1, 40)),
    "a single class": [9],
}


def sampling(n: int = 100, batch_size: int = 12, seed: int = 0, **options: object) -> Sampling:
    return Sampling(labels=np.zeros(n, dtype=np.int64), batch_size=batch_size, seed=seed, **options)


def of_classes(counts: list[int]) -> np.ndarray:
    """Labels of classes of these sizes, in no order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@sweep(("n", "batch_size"), SIZES)
def test_an_epoch_holds_every_image_and_fewer_twice_than_it_has_batches(n: int, batch_size: int) -> None:
    for epoch in range(3):
        batches = sampling(n, batch_size).batches(epoch)
        times = np.bincount(np.concatenate(batches), minlength=n)
        assert set(times.tolist()) <= {1, 2}
        assert (times == 2).sum() < len(batches)
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)


def test_other_images_are_drawn_twice_each_epoch() -> None:
    drawn = sampling(101, 25)
    twice = [frozenset(np.flatnonzero(np.bincount(np.concatenate(drawn.batches(e))) == 2)) for e in range(20)]
    assert len(set(twice)) > 15


@sweep(("n", "batch_size"), SIZES)
def test_batches_are_of_one_size_and_never_too_large(n: int, batch_size: int) -> None:
    drawn = sampling(n, batch_size)
    sizes = [len(batch) for batch in drawn.batches(0)]
    assert len(sizes) == len(drawn) == -(-n // batch_size)
    assert set(sizes) == {drawn.size}
    assert 1 <= drawn.size <= batch_size
    assert drawn.views == sum(sizes)


@sweep("options", [{}, {"aug_repeats": 3}, {"balanced": True}, {"aug_repeats": 2, "balanced": True}])
def test_the_seed_and_the_epoch_determine_the_order(options: dict[str, object]) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in sampling(seed=seed, **options).batches(epoch)]

    assert order(5, 7) == order(5, 7)
    assert order(5, 7) != order(5, 8)
    assert order(5, 7) != order(6, 7)
    assert order(0, 1) != order(1, 0)


def test_the_order_is_random() -> None:
    first = np.array([np.concatenate(sampling(50).batches(epoch))[0] for epoch in range(400)])
    counts = np.bincount(first, minlength=50)
    assert (counts > 0).sum() > 45
    assert counts.max() < 25  # 8 are expected


@sweep("repeats", [2, 3, 5])
@sweep(("n", "batch_size"), [(100, 12), (101, 32), (64, 15), (997, 128), (31, 31)])
def test_repeated_images_are_all_in_one_batch(n: int, batch_size: int, repeats: int) -> None:
    seen: set[int] = set()
    batches = sampling(n, batch_size, aug_repeats=repeats).batches(0)
    for batch in batches:
        images, counts = np.unique(batch, return_counts=True)
        assert (counts == repeats).all()
        assert len(batch) <= batch_size
        assert not seen & set(images.tolist())
        seen |= set(images.tolist())
    assert 0 <= len(seen) - -(-n // repeats) < len(batches)


@sweep("repeats", [2, 3, 4, 5])
@sweep(("n", "batch_size"), [(100, 12), (101, 32), (66, 15), (997, 128), (40, 20)])
def test_views_of_an_image_are_never_neighbors(n: int, batch_size: int, repeats: int) -> None:
    compared = 0
    for batch in sampling(n, batch_size, aug_repeats=repeats).batches(0):
        if len(set(batch.tolist())) > 1:  # one image alone has no other neighbor
            even = len(batch) // 2 * 2
            assert (batch[0:even:2] != batch[1:even:2]).all()
            compared += even
    assert compared > n / 2


@sweep("repeats", [1, 2, 3, 5])
@sweep("n", range(1, 12))
def test_views_of_an_image_lie_in_one_block(n: int, repeats: int) -> None:
    repeated = repeat_pairs(np.arange(n), repeats)
    assert sorted(repeated) == sorted([*range(n)] * repeats)
    for image in range(n):
        positions = np.flatnonzero(repeated == image)
        assert positions[-1] - positions[0] < (3 if n % 2 else 2) * repeats


@sweep("repeats", [1, 2, 3, 5])
@sweep("n", [50, 101, 1000])
def test_an_epoch_is_as_long_with_repeats_as_without(n: int, repeats: int) -> None:
    drawn = sum(map(len, sampling(n, 30, aug_repeats=repeats).batches(0)))
    assert n <= drawn < n + repeats * (1 + len(sampling(n, 30)))
    assert len(sampling(n, 30, aug_repeats=repeats)) == len(sampling(n, 30))  # 30 is a multiple of each


def test_with_repeats_every_image_has_its_epochs() -> None:
    drawn = sampling(99, 12, aug_repeats=3)
    epochs = [set(np.concatenate(drawn.batches(epoch)).tolist()) for epoch in range(30)]
    assert all(len(epoch) == 36 for epoch in epochs)  # 9 batches of 4 images
    assert set.union(*epochs) == set(range(99))
    assert epochs[0] != epochs[1]


@sweep("counts", SKEWED.values())
def test_balanced_epochs_show_every_class_equally_often(counts: list[int]) -> None:
    labels = of_classes(counts)
    drawn = Sampling(labels=labels, batch_size=16, seed=0, balanced=True)
    for epoch in range(3):
        order = np.concatenate(drawn.batches(epoch))
        assert len(order) == drawn.views >= len(labels)
        per_class = np.bincount(labels[order], minlength=len(counts))
        assert per_class.max() - per_class.min() <= 1


@sweep("repeats", [2, 3])
def test_balanced_epochs_stay_balanced_with_repeats(repeats: int) -> None:
    labels = of_classes([90, 10])
    drawn = Sampling(labels=labels, batch_size=12, seed=0, aug_repeats=repeats, balanced=True)
    for epoch in range(5):
        per_class = np.bincount(labels[np.concatenate(drawn.batches(epoch))])
        assert per_class.max() - per_class.min() <= repeats


@sweep("counts", SKEWED.values())
def test_balanced_epochs_use_the_images_of_a_class_evenly(counts: list[int]) -> None:
    labels = of_classes(counts)
    drawn = Sampling(labels=labels, batch_size=16, seed=1, balanced=True)
    for epoch in range(20):
        times = np.bincount(np.concatenate(drawn.batches(epoch)), minlength=len(labels))
        for label in range(len(counts)):
            of_class = times[labels == label]
            assert of_class.max() - of_class.min() <= 1


def test_balanced_order_is_that_of_a_scan_for_each_class() -> None:
    labels = np.random.default_rng(0).choice([7, 2, 9, 4], 50, p=[0.1, 0.2, 0.3, 0.4])
    rng, drawn = np.random.default_rng(1), []
    for label in (2, 4, 7, 9):
        members = np.array([index for index, other in enumerate(labels) if other == label])
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(-(-15 // len(members)))])[:15])
    expected = rng.permutation(rng.permuted(np.stack(drawn, axis=1), axis=1).flatten()[:58])
    assert np.array_equal(balanced_order(labels, 58, np.random.default_rng(1)), expected)


def test_balanced_epochs_leave_out_other_images_each_time() -> None:
    labels = of_classes([95, 5])
    drawn = Sampling(labels=labels, batch_size=16, seed=0, balanced=True)
    seen = {index for epoch in range(12) for index in np.concatenate(drawn.batches(epoch)).tolist()}
    assert seen == set(range(100))


def test_no_class_gains_from_what_is_cut_off_a_balanced_epoch() -> None:
    labels = of_classes([5, 5, 1])  # 11 draws: 4 of two classes, 3 of one
    drawn = Sampling(labels=labels, batch_size=11, seed=0, balanced=True)
    short = [np.bincount(labels[np.concatenate(drawn.batches(epoch))]).argmin() for epoch in range(90)]
    assert min(np.bincount(short, minlength=3)) > 10  # 30 are expected


@sweep("world", range(1, 9))
def test_shares_are_whole_pairs_that_make_up_the_batch(world: int) -> None:
    for b in range(1, 41):
        parts = [range(b)[rank_slice(b, rank, world)] for rank in range(world)]
        assert list(itertools.chain(*parts)) == list(range(b))
        assert all(part.start % 2 == 0 for part in parts if len(part))
        assert all(len(part) % 2 == 0 for part in parts if len(part) and part[-1] != b - 1)


@sweep("world", range(1, 9))
def test_shares_are_of_one_size_to_one_pair(world: int) -> None:
    for b in range(1, 41):
        sizes = [len(range(b)[rank_slice(b, rank, world)]) for rank in range(world)]
        assert max(sizes) - min(sizes) <= 2


def test_the_streams_of_one_seed_are_independent() -> None:
    drawn = sampling()
    keys = list(itertools.product((1, 2), range(3), range(5)))
    first = {key: tuple(drawn.generator(*key).random(4)) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert first == {key: tuple(sampling().generator(*key).random(4)) for key in keys}
    assert first != {key: tuple(sampling(seed=1).generator(*key).random(4)) for key in keys}
