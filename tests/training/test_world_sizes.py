"""Check shares, order, seeds, weighting and files of 8 and 64 processes, one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smallvit import Config
from smallvit.datasets.loader import TrainLoader, create_train_loader, evaluation_batches
from smallvit.runs.run import Run
from smallvit.training import checkpointing
from smallvit.training import train as engine
from smallvit.training.launch import open_run
from smallvit.training.setup import Setup, create_setup
from smallvit.utils.distributed import World
from tests.worlds import LoneWorld

SIZES = (8, 64)
TINY = {
    "arch": "vit96",
    "patch_size": 4,
    "lsa": True,
    "spt": True,
    "drop_path": 0.0,
    "amp": "off",
    "device": "cpu",
    "aug": "lee2021",
    "batch_size": 133,
    "train_fraction": 0.2,
    "epochs": 1,
}
"""An epoch has two steps of 65 pairs of images, which neither 8 nor 64 processes share equally."""


@pytest.fixture(scope="module")
def alone() -> Setup:
    return create_setup(Config.build(**TINY))


def loader(setup: Setup, rank: int, size: int) -> TrainLoader:
    """Return the loader of a rank for the data and options of a setup."""
    config = setup.config
    options = {"balanced": config.data.balanced, "rank": rank, "world": size}
    return create_train_loader(
        setup.dataset, config.optim.batch_size, setup.batches.augment, config.run.seed, setup.device, **options
    )


def as_rank(setup: Setup, rank: int, size: int) -> Setup:
    return replace(setup, world=World(rank, size, rank), batches=loader(setup, rank, size))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_parts_are_the_batch_of_one_process_in_order(alone: Setup, size: int) -> None:
    for epoch in range(2):
        whole = list(alone.batches.epoch(epoch))
        ranks = [list(loader(alone, rank, size).epoch(epoch)) for rank in range(size)]
        for step, (images, targets) in enumerate(whole):
            parts = [batches[step] for batches in ranks]
            assert len({len(x) for x, _ in parts} - {0}) == 2
            torch.testing.assert_close(torch.cat([x for x, _ in parts]), images, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.cat([y for _, y in parts]), targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_parts_of_an_evaluation_have_every_image_once(alone: Setup, size: int) -> None:
    labels = [
        torch.cat([y for _, y in evaluation_batches(alone.dataset, "test", alone.device, 3, rank, size)])
        for rank in range(size)
    ]
    counted = torch.cat(labels)
    assert torch.equal(torch.bincount(counted[counted >= 0]), torch.bincount(alone.dataset.test.labels))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_starts_from_the_same_weights_seed_and_data(alone: Setup, size: int) -> None:
    first = LoneWorld(0, size)
    expected = create_setup(Config.build(**TINY), first)
    for rank in (1, size // 2, size - 1):
        mine = create_setup(Config.build(**TINY), LoneWorld(rank, size, rank, sent=first.sent))
        for one, each in ((alone, mine), (expected, mine)):
            for name, value in one.model.state_dict().items():
                assert torch.equal(value, each.model.state_dict()[name]), name
        assert mine.batches.sampling.seed == alone.batches.sampling.seed
        assert (mine.dataset.fingerprint, mine.steps) == (alone.dataset.fingerprint, alone.steps)
        images, targets = next(iter(mine.batches.epoch(0)))
        again, labels = next(iter(loader(alone, rank, size).epoch(0)))
        assert torch.equal(images, again)
        assert torch.equal(targets, labels)


def gradients(setup: Setup, epoch: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients of the first batch's part."""
    setup.optimizer.zero_grad()
    images, targets = next(iter(setup.batches.epoch(epoch)))
    loss = engine.backward(setup, images, targets, (epoch, 0))
    return loss, [each.grad.clone() for each in setup.model.parameters() if each.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_one_process(alone: Setup, size: int, parts: int) -> None:
    """Check that unequal parts are weighted by their images; DDP and FSDP take the mean over the processes."""
    split = replace(alone, config=alone.config.replace(grad_accum_steps=min(parts, 128 // size)))
    loss, expected = gradients(split)
    losses, sums = torch.zeros(()), [torch.zeros_like(each) for each in expected]
    counts = set()
    for rank in range(size):
        mine = as_rank(split, rank, size)
        counts.add(len(next(iter(mine.batches.epoch(0)))[0]))
        own, each = gradients(mine)
        losses += own
        for total, gradient in zip(sums, each, strict=True):
            total += gradient / size
    assert len(counts) > 1
    torch.testing.assert_close(losses, loss, rtol=1e-5, atol=1e-6)
    for total, gradient in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-5)


def fit(world: LoneWorld, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train as one of the processes."""

    @contextmanager
    def init_distributed() -> Iterator[World]:
        yield world

    config = Config.build(**TINY, out=str(folder))
    monkeypatch.setattr(engine.distributed, "init_distributed", init_distributed)
    if world.main:
        with open_run(config) as run:
            return engine.fit(run).summary
    return engine.fit(Run(Path(), config, new=False)).summary


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_only_the_first_rank_writes_and_all_communicate_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    monkeypatch.setattr(checkpointing, "CHECK_SECONDS", 0)  # agree after every step
    monkeypatch.chdir(tmp_path)
    first = LoneWorld(0, size)
    fit(first, tmp_path / "first", monkeypatch)
    assert {each.name for each in (tmp_path / "first").iterdir()} >= {Run.SUMMARY, Run.BEST, Run.LAST}
    kept = []
    snapshot = checkpointing.checkpoint.snapshot
    for rank in (1, size - 1):
        capsys.readouterr()
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        (folder / Run.CONFIG).write_bytes((tmp_path / "first" / Run.CONFIG).read_bytes())
        (_, config), *others = first.sent
        world = LoneWorld(rank, size, rank, sent=[(folder, config), *others])
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpointing.checkpoint, "snapshot", lambda *a, **k: kept.append(len(snapshot(*a, **k))) or {}
            )
            fit(world, folder, monkeypatch)
        assert world.calls == first.calls
        assert [each.name for each in folder.iterdir()] == [Run.CONFIG]
        assert capsys.readouterr().out == ""
    assert kept
    assert not any(kept)  # no weights are copied to the host
    assert {each.name for each in tmp_path.iterdir()} == {"first", *(f"rank{rank}" for rank in (1, size - 1))}
