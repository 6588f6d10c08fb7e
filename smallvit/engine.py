"""Training: from a configuration to a run folder. Read `fit` from top to bottom."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.profiler import record_function

from smallvit import checkpoint, distributed, hardware
from smallvit.config import Config
from smallvit.datasets.streaming import explained_workers
from smallvit.interrupt import Signals
from smallvit.keeper import Keeper
from smallvit.loggers import open_loggers
from smallvit.opening import open_run
from smallvit.optim import openness
from smallvit.outcome import Result, show, summarise
from smallvit.plugins import set_openness, temperatures
from smallvit.progress import TrainingProgress
from smallvit.report import plot_curves
from smallvit.runs import Run
from smallvit.setup import Setup, prepare
from smallvit.tracing import tracing

REGULARISATION = 3
"""Stream of random numbers for dropout and stochastic depth; 0 to 2 belong to the batches."""


def train(config: Config) -> Result:
    """Train a model and write its run folder; the best epoch is chosen on validation images, never on the test.

    Raises:
        InputError: the configuration asks for something that is not there or does not fit.
        TrainingError: the loss is no longer finite or has grown far beyond where it began, or memory is short.
        KeyboardInterrupt: a signal ended the run, which is saved.
        OSError: the run folder can no longer be written.
    """
    with open_run(config) as run:
        return fit(run)


def fit(run: Run) -> Result:
    """Train in an open run folder, from the start or from where it was interrupted."""
    with distributed.join() as world:
        run.follow(*world.send(run.place()))
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.main)
        if (summary := world.send(run.read_summary() if world.main else None)) is not None:
            console.print(f"{run.folder} is finished already")
            return show(Result(run.folder, summary), console)

        # Data, model, optimiser
        setup = prepare(run.config, world, begins=world.send(not run.saved))
        setup.announce(console)
        config, epochs = setup.config, setup.config.optim.epochs
        if world.main:
            run.begin(config)
        world.agree(0)  # the others look there only now

        # Loop, from where an interrupted run left off
        with (
            Signals() as signals,
            TrainingProgress(console, setup.steps, epochs) as display,
            hardware.explained_memory(config.optim.batch_size, setup.dataset.img_size),
            explained_workers(),
            tracing(run, setup, console) as traced,
            open_loggers(config.run.loggers if world.main else (), run.folder, config.options()) as loggers,
        ):
            keeper = Keeper(run, setup, signals, display)
            if keeper.restore():
                console.print(f"resume after {keeper.place} of {epochs}")
            for figures in keeper.state.history:
                loggers.log(figures)
            console.print(f"run    {run.folder}")
            display.begin(keeper.done)
            while keeper.state.epoch < epochs:
                for images, targets in setup.batches.epoch(setup.views(keeper.state.epoch), keeper.state.step):
                    keeper.step(train_step(setup, keeper.state.epoch, keeper.state.step, images, targets))
                    traced()
                figures = judge(setup, keeper)
                display.epoch(figures)
                loggers.log(figures)

            # The test split, once, with the weights chosen on the validation split (the last, where there is none)
            state = keeper.state
            weights, chosen = world.send(checkpoint.load_weights(run / Run.BEST) if world.main else None)
            setup.load_judged(weights)
            test = setup.evaluate("test", flip=config.augment.test_flip, watch=keeper.watched)
            summary = summarise(setup, state, chosen, test)
            if world.main:
                plot_curves(state.history, run / Run.CURVES, f"{run.folder.name}: test top-1 {test['top1']:.2f} %")
                run.write_json(Run.SUMMARY, summary)
                loggers.finish(summary)
        if (left_out := len(setup.dataset.test) - test["images"]) > 0:
            console.print(f"left out of the test: {left_out} images that cannot be decoded")
        return show(Result(run.folder, summary), console)


def train_step(setup: Setup, epoch: int, step: int, images: Tensor, targets: Tensor) -> Tensor:
    """Fit the weights to one batch (or this process's part of it); returns its loss's share of the whole batch's."""
    config, model, optimizer = setup.config, setup.model, setup.optimizer
    number = epoch * len(setup.batches) + step + 1
    opened = openness(number, setup.steps, config.optim.diagonal_until)
    if config.model.plugin_init == "exact":
        set_openness(model, opened)
    setup.schedule.step_update(number)
    for norm in setup.still:
        norm.eval()
    torch.manual_seed(_seed(config.run.seed, REGULARISATION, epoch, step, setup.world.rank))
    optimizer.zero_grad()
    if config.compute.compile == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    loss = backward(setup, images, targets, (setup.views(epoch), step))
    with record_function("optimiser"):
        if config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
    if setup.average is not None:
        with record_function("moving average"):
            setup.average.update(model, number)
        if config.model.plugin_init == "exact":
            set_openness(setup.average.module, opened)  # no weight, to be averaged
    return loss


def backward(setup: Setup, images: Tensor, targets: Tensor, place: tuple[int, int]) -> Tensor:
    """Gradients of a batch's mean loss, part by part; returns this process's share of that loss.

    `place` is the batch's: epoch and step.
    """
    optim, world = setup.config.optim, setup.world
    size = setup.batches.sampling.size
    share = torch.zeros((), device=setup.device)
    parts = list(zip(images.tensor_split(optim.accumulate), targets.tensor_split(optim.accumulate), strict=True))
    for number, (part, wanted) in enumerate(parts, 1):
        with record_function("teacher"):
            answers = (setup.teacher(part, (*place, number)),) if setup.teacher is not None else ()
        with distributed.last_backward(setup.replicated, last=number == len(parts)):
            with record_function("forward"), hardware.autocast(setup.device, setup.dtype):
                found = setup.objective(setup.forward, part, wanted, *answers)
            loss = found["loss"] * (len(part) / size)
            with record_function("backward"):
                (loss * world.size).backward()  # gradients are averaged over the processes
        share += loss.detach()
    return share


def judge(setup: Setup, keeper: Keeper) -> dict[str, Any]:
    """An epoch's metrics, and whether it is the best so far."""
    state, model = keeper.state, setup.model
    train_loss = keeper.mean_loss()
    keeper.tick()
    if setup.world.size > 1:
        for each in (model, setup.judged):
            distribute_bn(each, setup.world.size)  # the main process's, as DDP has it within the epoch
    val = setup.evaluate("val", watch=keeper.watched)
    raw = setup.evaluate("val", model=model, watch=keeper.watched) if setup.average is not None else None
    best = val is None or (val["top1"], -val["loss"]) > (state.best_val_top1, -state.best_val_loss)
    if best:
        state.best_epoch = state.epoch + 1
    if best and val is not None:
        state.best_val_top1, state.best_val_loss = val["top1"], val["loss"]
    learnt = {name: distributed.whole(each).tolist() for name, each in temperatures(setup.judged).items()}
    figures = {
        "epoch": state.epoch + 1,
        "train_loss": train_loss,
        "val_loss": val and val["loss"],
        "val_top1": val and val["top1"],
        **({"val_top1_raw": raw["top1"]} if raw else {}),
        **({"temperatures": learnt} if learnt else {}),
        "lr": setup.optimizer.param_groups[0]["lr"],
        "images_per_second": setup.batches.sampling.views / state.epoch_seconds,
        "seconds": keeper.seconds,
    }
    keeper.epoch(figures, best)
    return figures


def _seed(*numbers: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
