"""Training: from a configuration to a run folder. Read `fit` from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from smallvit import checkpoint, datasets, hardware, models, objectives, optim
from smallvit.config import Config, InputError
from smallvit.datasets.augment import Augment
from smallvit.datasets.loaders import TrainingBatches, evaluation_batches
from smallvit.evaluate import evaluate
from smallvit.plugins import describe, set_fused_attention
from smallvit.profile import count_macs, count_parameters
from smallvit.progress import TrainingProgress
from smallvit.report import plot_curves
from smallvit.runs import Run, open_run

CHECKPOINT_SECONDS = 5.0
"""Least time between two checkpoints: what an interruption costs at most, beside the epoch it falls in."""
LOOK_SECONDS = 0.5
"""How often the loss is fetched from the device, to show it and to see that it is finite."""
EVALUATION_BATCH = {"cpu": 128, "gpu": 1024}
"""Images at once; on CPUs the cache decides."""
REGULARISATION = 2
"""Stream of random numbers for dropout and stochastic depth; 0 and 1 belong to the batches."""


class TrainingError(RuntimeError):
    """Training cannot go on, though the input was good. Its one line says where it stopped and what to try."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what `summary.json` there says."""

    folder: Path
    summary: dict[str, Any]

    def load(self, weights: str = "best") -> nn.Module:
        """The trained model."""
        return checkpoint.load(self.folder, weights)


def train(config: Config) -> Result:
    """Train a model and write its run folder; the best epoch is chosen on validation images, never on the test.

    Raises:
        InputError: the configuration asks for something that is not there or does not fit.
        TrainingError: the loss is no longer finite.
    """
    with open_run(config) as run:
        return fit(run)


def fit(run: Run) -> Result:
    """Train in an open run folder, from the start or from where it was interrupted."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if run.summary:
        console.print(f"{run.folder} is finished already")
        return _show(Result(run.folder, run.summary), console)

    # Data, model, optimiser
    setup = prepare(run.config, console)
    config, model, batches = setup.config, setup.model, setup.batches
    epochs, steps = config.optim.epochs, len(batches)

    # Where an interrupted run goes on
    run.begin(config)
    progress = Progress()
    if (saved := checkpoint.load_state(run, model, setup.optimizer)) is not None:
        progress = Progress(**saved)
        if progress.images != setup.dataset.fingerprint:
            raise InputError(f"--resume {run.folder}: the images in {config.data.data} are not those it began with")
        run.read_metrics(progress.epoch)
        console.print(f"resume after epoch {progress.epoch} of {epochs}")
    progress.images = setup.dataset.fingerprint
    console.print(f"run    {run.folder}")

    # Loop
    best: dict[str, Tensor] | None = None  # weights better than those in the last checkpoint
    saved_at = time.monotonic()
    with TrainingProgress(console, epochs * steps, progress.epoch * steps, epochs) as display:
        for epoch in range(progress.epoch, epochs):
            started = time.monotonic()
            train_loss = train_epoch(setup, epoch, display)
            trained = time.monotonic()
            val = evaluate(model, setup.evaluation_batches("val"), setup.device, setup.dtype)
            progress.epoch = epoch + 1
            progress.step_seconds += trained - started
            progress.seconds += time.monotonic() - started
            if (val["top1"], -val["loss"]) > (progress.best_val_top1, -progress.best_val_loss):
                progress.best_epoch = epoch + 1
                progress.best_val_top1, progress.best_val_loss = val["top1"], val["loss"]
                best = checkpoint.snapshot(model)
            figures = {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val["loss"],
                "val_top1": val["top1"],
                "lr": setup.optimizer.param_groups[0]["lr"],
                "images_per_second": len(setup.dataset.train) / (trained - started),
                "seconds": progress.seconds,
            }
            run.record(figures)
            display.epoch(figures, (epoch + 1) * steps)
            if epoch + 1 == epochs or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                _save(run, setup, progress, best, val["top1"])
                best, saved_at = None, time.monotonic()

    # The test split, once, with the weights chosen on the validation split
    weights, _ = checkpoint.load_weights(run / Run.BEST)
    model.load_state_dict(weights)
    test = evaluate(model, setup.evaluation_batches("test"), setup.device, setup.dtype)
    summary = summarise(setup, progress, test)
    plot_curves(run.history, run / Run.CURVES, f"{run.folder.name}: test top-1 {test['top1']:.2f} %")
    run.write_json(Run.SUMMARY, summary)
    return _show(Result(run.folder, summary), console)


@dataclass(frozen=True)
class Setup:
    """All that a run trains with."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    dataset: datasets.ImageDataset
    batches: TrainingBatches
    model: nn.Module
    spec: dict[str, Any]
    """The arguments of `create_model` that made the model."""
    macs: int
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of val or test, as they are."""
        size = EVALUATION_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        images = getattr(self.dataset, split)
        return evaluation_batches(images, self.dataset.mean, self.dataset.std, self.device, size)

    def metadata(self, epoch: int, val_top1: float) -> dict[str, Any]:
        """What a weights file says about itself."""
        data = {name: getattr(self.dataset, name) for name in ("name", "class_names", "mean", "std")}
        return {"model": self.spec, "data": data, "epoch": epoch, "val_top1": val_top1}


@dataclass
class Progress:
    """How far a run has come; kept in its checkpoint."""

    epoch: int = 0
    """Epochs completed."""
    best_epoch: int = 0
    best_val_top1: float = -1.0
    best_val_loss: float = 0.0
    seconds: float = 0.0
    """Of training and validation."""
    step_seconds: float = 0.0
    """Of training alone."""
    images: str = ""
    """Fingerprint of the data set."""


def prepare(config: Config, console: Console) -> Setup:
    """Data, model and optimiser of a run, each announced in a line or two."""
    device = hardware.pick_device(config.run.device)
    dtype = hardware.pick_dtype(device, config.run.amp)

    dataset = datasets.load(config.data)
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip)
    batches = TrainingBatches(dataset, config.optim.batch_size, augment, config.run.seed, device)
    sizes = ", ".join(f"{len(getattr(dataset, split)):,} {split}" for split in ("train", "val", "test"))
    console.print(f"data   {dataset.name}: {len(dataset.class_names)} classes, {sizes}")
    for note in dataset.notes:
        console.print(f"       {note}")

    torch.manual_seed(config.run.seed)
    spec = asdict(config.model) | {
        "img_size": dataset.img_size,
        "in_chans": dataset.in_chans,
        "num_classes": len(dataset.class_names),
        "patch_size": config.model.patch_size or models.patch_for(config.model.arch, dataset.img_size),
    }
    model = models.create_model(**spec)
    macs = count_macs(model, dataset.in_chans, dataset.img_size)
    model.to(device)
    set_fused_attention(model, device.type, dtype)
    console.print(f"model  {models.describe_choice(spec['arch'], spec['img_size'], spec['patch_size'])}")
    console.print(f"       {describe(model)}".replace("\n", "\n       "))
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    console.print(f"device {device}: {hardware.describe_hardware(device)}, {precision}")

    optimizer = optim.create_optimizer(model, config.optim)
    schedule = optim.create_schedule(optimizer, config.optim, config.optim.epochs * len(batches))
    return Setup(
        config.replace(data=dataset.source),
        device,
        dtype,
        dataset,
        batches,
        model,
        spec,
        macs,
        optimizer,
        schedule,
    )


def train_epoch(setup: Setup, epoch: int, display: TrainingProgress) -> float:
    """One pass over the training images; returns its mean loss.

    Raises:
        TrainingError: a loss is not finite.
    """
    config, steps = setup.config, len(setup.batches)
    setup.model.train()
    losses = torch.zeros(steps, device=setup.device)
    started = looked = time.monotonic()
    seen = 0
    for step, (images, targets) in enumerate(setup.batches.epoch(epoch)):
        setup.schedule.step_update(epoch * steps + step)
        torch.manual_seed(_seed(config.run.seed, REGULARISATION, epoch, step))
        with hardware.autocast(setup.device, setup.dtype):
            loss = objectives.supervised(setup.model, images, targets, smoothing=config.optim.smoothing)["loss"]
        setup.optimizer.zero_grad()
        loss.backward()
        if config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(setup.model.parameters(), config.optim.clip_grad)
        setup.optimizer.step()
        losses[step] = loss.detach()
        seen += len(images)
        if (now := time.monotonic()) - looked > LOOK_SECONDS:
            looked = now
            mean = _finite_mean(losses[: step + 1], epoch, setup)
            display.step(epoch, epoch * steps + step + 1, mean, seen / (now - started))
    return _finite_mean(losses, epoch, setup)


def summarise(setup: Setup, progress: Progress, test: dict[str, float]) -> dict[str, Any]:
    """The contents of summary.json; accuracies in per cent."""
    seen = progress.epoch * len(setup.dataset.train)
    return {
        "test_top1": test["top1"],
        "test_loss": test["loss"],
        "val_top1": progress.best_val_top1,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "train_seconds": progress.seconds,
        "images_seen": seen,
        "images_per_second": seen / progress.step_seconds,
        "parameters": count_parameters(setup.model),
        "macs": setup.macs,
        "peak_memory_bytes": hardware.peak_memory_bytes(setup.device),
        "device": str(setup.device),
        "hardware": hardware.describe_hardware(setup.device),
        "precision": "bf16" if setup.dtype == torch.bfloat16 else "fp32",
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


def _save(run: Run, setup: Setup, progress: Progress, best: dict[str, Tensor] | None, val_top1: float) -> None:
    """Write a checkpoint. The state comes last: what precedes it is repeated exactly if it is not reached."""
    if best is not None:
        metadata = setup.metadata(progress.best_epoch, progress.best_val_top1)
        checkpoint.save_weights(run / Run.BEST, best, metadata)
    last = setup.metadata(progress.epoch, val_top1)
    checkpoint.save_weights(run / Run.LAST, checkpoint.snapshot(setup.model), last)
    run.write_metrics()
    checkpoint.save_state(run, setup.model, setup.optimizer, asdict(progress))


def _seed(*numbers: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _finite_mean(losses: Tensor, epoch: int, setup: Setup) -> float:
    mean = losses.mean().item()
    if not math.isfinite(mean):
        step = int(torch.nonzero(~losses.isfinite())[0])
        rate = setup.schedule._get_lr(epoch * len(setup.batches) + step)[0]
        raise TrainingError(
            f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.3g}: "
            "try a lower --lr, --clip-grad 1, a longer --warmup, or --amp off"
        )
    return mean


def _show(result: Result, console: Console) -> Result:
    summary, folder = result.summary, result.folder
    seconds = f"{summary['train_seconds']:.0f} s"
    console.print(
        f"\ntest top-1 {summary['test_top1']:.2f} %  (validation {summary['val_top1']:.2f} %, "
        f"best epoch {summary['best_epoch']} of {summary['epochs']}, trained in {seconds}, "
        f"{summary['images_per_second']:,.0f} images/s)"
    )
    for what, name in (("weights", Run.BEST), ("curves", Run.CURVES), ("summary", Run.SUMMARY)):
        console.print(f"{what:8} {folder / name}")
    return result
