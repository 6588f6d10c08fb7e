"""Training: from a configuration to a run folder. Read `fit` from top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from smallvit import checkpoint, hardware, objectives
from smallvit.config import Config
from smallvit.errors import InputError, TrainingError
from smallvit.optim import openness
from smallvit.outcome import Result, show, summarise
from smallvit.plugins import set_openness
from smallvit.progress import TrainingProgress
from smallvit.report import plot_curves
from smallvit.runs import Run, open_run
from smallvit.setup import Setup, prepare

CHECKPOINT_SECONDS = 5.0
"""Least time between two checkpoints: what an interruption costs at most, beside the epoch it falls in."""
LOOK_SECONDS = 0.5
"""How often the loss is fetched from the device, to show it and to see that it is finite."""
REGULARISATION = 3
"""Stream of random numbers for dropout and stochastic depth; 0 to 2 belong to the batches."""


@dataclass
class RunState:
    """How far a run has come; kept in its checkpoint."""

    images: str
    """Fingerprint of the data set."""
    epoch: int = 0
    """Epochs completed."""
    best_epoch: int = 0
    best_val_top1: float = -1.0
    best_val_loss: float = math.inf
    seconds: float = 0.0
    """Of training and validation."""
    step_seconds: float = 0.0
    """Of training alone."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of every epoch: what metrics.jsonl shows."""


def train(config: Config) -> Result:
    """Train a model and write its run folder; the best epoch is chosen on validation images, never on the test.

    Raises:
        InputError: the configuration asks for something that is not there or does not fit.
        TrainingError: the loss is no longer finite.
        OSError: the run folder can no longer be written.
    """
    with open_run(config) as run:
        return fit(run)


def fit(run: Run) -> Result:
    """Train in an open run folder, from the start or from where it was interrupted."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if (summary := run.read_summary()) is not None:
        console.print(f"{run.folder} is finished already")
        return show(Result(run.folder, summary), console)

    # Data, model, optimiser
    setup = prepare(run.config)
    setup.announce(console)
    config, model, optimizer, batches = setup.config, setup.model, setup.optimizer, setup.batches
    epochs, steps = config.optim.epochs, len(batches)

    # Where an interrupted run goes on
    run.begin(config)
    state = RunState(images=setup.dataset.fingerprint)
    if (saved := checkpoint.load_state(run, model, optimizer, setup.average)) is not None:
        if saved["images"] != state.images:
            raise InputError(f"--resume {run.folder}: the images in {config.data.data} are not those it began with")
        state = RunState(**saved)
        checkpoint.load_weights(run / Run.BEST)  # missing or damaged: better known now than after training
        console.print(f"resume after epoch {state.epoch} of {epochs}")
    console.print(f"run    {run.folder}")

    # Loop
    best: dict[str, Tensor] | None = None  # weights better than those in the last checkpoint
    saved_at = time.monotonic()
    with TrainingProgress(console, epochs * steps, state.epoch * steps, epochs) as display:
        for epoch in range(state.epoch, epochs):
            started = time.monotonic()
            train_loss = train_epoch(setup, epoch, display)
            trained = time.monotonic()
            val = setup.evaluate("val")
            state.epoch = epoch + 1
            state.step_seconds += trained - started
            state.seconds += time.monotonic() - started
            if val is None or (val["top1"], -val["loss"]) > (state.best_val_top1, -state.best_val_loss):
                state.best_epoch = epoch + 1
                best = checkpoint.snapshot(setup.judged)
            if val is not None and state.best_epoch == epoch + 1:
                state.best_val_top1, state.best_val_loss = val["top1"], val["loss"]
            raw = setup.evaluate("val", model=model) if setup.average is not None else None
            figures = {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "val_loss": val and val["loss"],
                "val_top1": val and val["top1"],
                **({"val_top1_raw": raw["top1"]} if raw else {}),
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": batches.sampling.views / (trained - started),
                "seconds": state.seconds,
            }
            state.history.append(figures)
            display.epoch(figures, (epoch + 1) * steps)
            if epoch + 1 == epochs or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                _save(run, setup, state, best)
                best, saved_at = None, time.monotonic()

    # The test split, once, with the weights chosen on the validation split (the last, where there is none)
    weights, chosen = checkpoint.load_weights(run / Run.BEST)
    setup.judged.load_state_dict(weights)
    test = setup.evaluate("test", flip=config.augment.test_flip)
    plot_curves(state.history, run / Run.CURVES, f"{run.folder.name}: test top-1 {test['top1']:.2f} %")
    if (left_out := len(setup.dataset.test) - test["images"]) > 0:
        console.print(f"left out of the test: {left_out} images that cannot be decoded")
    summary = summarise(setup, state, chosen, test)
    run.write_json(Run.SUMMARY, summary)
    return show(Result(run.folder, summary), console)


def train_epoch(setup: Setup, epoch: int, display: TrainingProgress) -> float:
    """One pass over the training images; returns its mean loss.

    Raises:
        TrainingError: a loss is not finite.
    """
    config, model, optimizer = setup.config, setup.model, setup.optimizer
    epochs, steps = config.optim.epochs, len(setup.batches)
    losses, rates = torch.zeros(steps, device=setup.device), []
    started = looked = time.monotonic()
    seen = 0
    model.train()
    for step, (images, targets) in enumerate(setup.batches.epoch(epoch)):
        setup.schedule.step_update(epoch * steps + step + 1)
        if config.model.plugin_init == "exact":
            set_openness(model, openness(epoch * steps + step + 1, epochs * steps, config.optim.diagonal_until))
        rates.append(optimizer.param_groups[0]["lr"])
        torch.manual_seed(_seed(config.run.seed, REGULARISATION, epoch, step))
        optimizer.zero_grad()
        losses[step] = backward(setup, images, targets)
        if config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        if setup.average is not None:
            update_average(setup, epoch * steps + step + 1)
        seen += len(images)
        if (now := time.monotonic()) - looked > LOOK_SECONDS:
            looked = now
            mean = _finite_mean(losses[: step + 1], rates, epoch)
            display.step(epoch, epoch * steps + step + 1, mean, seen / (now - started))
    return _finite_mean(losses, rates, epoch)


def backward(setup: Setup, images: Tensor, targets: Tensor) -> Tensor:
    """Gradients of a batch's mean loss, part by part; returns that loss."""
    optim, whole = setup.config.optim, torch.zeros((), device=setup.device)
    for part, wanted in zip(images.chunk(optim.accumulate), targets.chunk(optim.accumulate), strict=True):
        with hardware.autocast(setup.device, setup.dtype):
            loss = objectives.supervised(setup.model, part, wanted, smoothing=optim.smoothing, loss=optim.loss)["loss"]
        loss = loss * (len(part) / len(images))
        loss.backward()
        whole += loss.detach()
    return whole


def update_average(setup: Setup, step: int) -> None:
    """Let the moving average follow the weights; how open the diagonal is, is no weight."""
    setup.average.update(setup.model, step)
    if setup.config.model.plugin_init == "exact":
        epochs, until = setup.config.optim.epochs, setup.config.optim.diagonal_until
        set_openness(setup.average.module, openness(step, epochs * len(setup.batches), until))


def _save(run: Run, setup: Setup, state: RunState, best: dict[str, Tensor] | None) -> None:
    """Write a checkpoint. The state comes last: what precedes it is repeated exactly if it is not reached."""
    if best is not None:
        metadata = setup.metadata(state.best_epoch, state.history[state.best_epoch - 1]["val_top1"])
        checkpoint.save_weights(run / Run.BEST, best, metadata)
    last = setup.metadata(state.epoch, state.history[-1]["val_top1"])
    checkpoint.save_weights(run / Run.LAST, checkpoint.snapshot(setup.judged), last)
    run.write_lines(Run.METRICS, state.history)
    checkpoint.save_state(run, setup.model, setup.optimizer, setup.average, asdict(state))


def _seed(*numbers: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _finite_mean(losses: Tensor, rates: list[float], epoch: int) -> float:
    bad = torch.nonzero(~losses.isfinite())
    if len(bad):
        step = int(bad[0])
        raise TrainingError(
            f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1}, at learning rate "
            f"{rates[step]:.2g}: try a lower --lr, --clip-grad 1, a longer --warmup, or --amp off"
        )
    return losses.mean().item()
