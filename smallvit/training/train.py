"""Train a model from a configuration to a finished run folder. Start reading at `fit`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from timm.utils import distribute_bn
from torch import Tensor, nn

from smallvit.config.config import Config
from smallvit.datasets.loader import explain_worker_failures
from smallvit.evaluation.stats import format_class_means
from smallvit.models import checkpoint, weights_info
from smallvit.plugins import PLUGINS
from smallvit.runs.run import TITLES, Run, best_epoch, primary_metric
from smallvit.training.checkpointing import Checkpointer, RunState
from smallvit.training.launch import open_run
from smallvit.training.limits import fit_batch_size
from smallvit.training.optim import plugin_strength
from smallvit.training.processes import start_processes
from smallvit.training.setup import Setup, create_setup
from smallvit.utils import distributed, hardware
from smallvit.utils.signals import SignalHandler
from smallvit.utils.terminal import TrainingProgress, create_console

if TYPE_CHECKING:
    from smallvit.runs.trackers import Trackers

MODEL_STREAM = 3
"""Random number stream of dropout and stochastic depth; 0 to 2 belong to the batches."""


TRAINED = (("next", "smallvit eval RUN"), ("", "smallvit report RUN"), ("", "smallvit predict RUN IMAGES"))
PRETRAINED = (
    ("next", "smallvit train --init RUN --recipe finetune-ssl --data LABELED"),
    ("", "smallvit probe RUN --data LABELED"),
    ("", "smallvit report RUN"),
)
"""Commands for a finished run, with labels and without."""


def train(config: Config) -> TrainResult:
    """Train a model and write its run folder; the best epoch is chosen on validation images, never on the test.

    Raises:
        InputError: An option names something that does not exist or does not fit.
        TrainingError: The loss is not finite, or memory is exhausted.
        KeyboardInterrupt: A signal stopped the run, which is saved.
        OSError: The run folder can no longer be written.
    """
    with open_run(config) as run:
        if run.leads:
            print(f"run    {run.folder}")
        return fit(run)


def fit(run: Run) -> TrainResult:
    """Train in an open run folder, from the start or from its last checkpoint."""
    with start_processes(run.config), distributed.init_distributed() as world:
        run.follow(*world.send((run.folder, run.config)))
        console = create_console(quiet=not world.main)
        if (summary := world.send(run.read_summary() if world.main else None)) is not None:
            console.print(f"{run.folder} is finished already")
            return print_result(TrainResult(run.folder, summary), console)

        # Data, model, optimizer
        saved = world.send(weights_info.read_progress(run / Run.STATE) if world.main and run.saved else None)
        if run.config.optim.batch_size == "auto":
            run.config = fit_batch_size(run.config, world, create_setup, train_step)
        setup = create_setup(run.config, world, saved=saved)
        setup.print_overview(console)
        config, epochs, budget = setup.config, setup.config.optim.epochs, setup.budget
        if world.main:
            run.begin(config)
        world.agree(0)  # the other processes read the folder only now

        # Loop, from the last checkpoint
        with (
            SignalHandler() as signals,
            TrainingProgress(
                console, *((setup.steps, epochs) if budget is None else (len(setup.batches), 1))
            ) as display,
            hardware.tf32(setup.device, setup.dtype),
            hardware.explain_out_of_memory(int(config.optim.batch_size), setup.dataset.img_size),
            explain_worker_failures(),
            _open_trackers(run, setup) as trackers,
        ):
            checkpointer = Checkpointer(run, setup, signals, display)
            if budget is not None:
                budget.started = run.opened_at
            if checkpointer.restore():
                console.print(f"resume after {checkpointer.position}")
                if (start := config.optim.sched_start_epoch) and checkpointer.state.epoch >= start:
                    console.print(f"resume schedule {config.optim.sched} again since epoch {start + 1}, without warmup")
            state = checkpointer.state
            for metrics in state.history if trackers else ():
                trackers.log(metrics)
            length = f"{epochs} epochs" if budget is None else f"for {config.optim.max_time}, epochs"
            console.print(f"train  {length} of {len(setup.batches)} steps")
            display.begin(checkpointer.steps_done)
            if budget is not None and not checkpointer.finished:
                measure_evaluation(setup)
                display.deadline = budget.started + budget.limit
            while not checkpointer.finished:
                for images, targets in setup.batches.epoch(setup.augmentation_epoch(state.epoch), state.step):
                    if budget is not None and budget.finished:
                        break
                    step = partial(train_step, setup, state.epoch, state.step, images, targets)
                    first = setup.compilation.pending
                    checkpointer.step(compile_step(run, setup, signals, console, step) if first else step())
                metrics = evaluate_epoch(setup, checkpointer)
                display.epoch(metrics)
                if trackers:
                    trackers.log(metrics)

            if checkpointer.exhausted:
                console.print(f"stop   {config.run.select_by} has not improved since epoch {state.best_epoch}")
            # Evaluate the test split once, with the best weights on the validation split (without one, the last)
            weights, chosen = world.send(checkpoint.load_weights(run / Run.BEST) if world.main else None)
            checkpoint.load_tensors(setup.eval_model, weights)
            thresholds = chosen["data"].get("thresholds")
            test = setup.evaluate(
                "test", flip=config.augment.test_flip, thresholds=thresholds, wrap=checkpointer.stop_on_signal
            )
            summary = summarize(setup, state, chosen, test)
            if world.main:
                from smallvit.runs.curves import plot_curves

                name, title = setup.accuracies[0], run.folder.name
                if test[name] is not None:
                    title += f": test {TITLES[name]} {test[name]:.2f} %"
                plot_curves(state.history, run / Run.CURVES, title, config.run.select_by)
                if budget is not None:
                    summary["elapsed_seconds"] = budget.elapsed
                run.write_json(Run.SUMMARY, summary)
                if trackers:
                    trackers.finish(summary)
                if not config.run.keep_resume:
                    (run / Run.STATE).unlink(missing_ok=True)
        if (skipped := len(setup.dataset.test) - test["images"]) > 0:
            console.print(f"test: skipped {skipped} images that cannot be decoded")
        return print_result(TrainResult(run.folder, summary), console)


def measure_evaluation(setup: Setup) -> None:
    """Measure the time of evaluating an image for --max-time, by a few batches whose results are not used."""
    began = setup.budget.elapsed
    split = "val" if len(setup.dataset.val) else "test"
    images = setup.evaluate(split, wrap=lambda batches: islice(batches, 3))["images"]
    setup.budget.measured(images, setup.budget.elapsed - began)


def set_strength(setup: Setup, model: nn.Module, strength: float) -> None:
    """Phase in the plugins that were patched with init="preserve"."""
    if setup.config.model.plugin_init == "preserve":
        for name in setup.spec["plugins"]:
            PLUGINS[name].set_strength(model, strength)


def learned_values(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Return what plugins record after each epoch, by layer."""
    values = [PLUGINS[name].metrics(setup.eval_model) for name in setup.spec["plugins"]]
    return {
        key: {layer: distributed.full_tensor(value).tolist() for layer, value in layers.items()}
        for each in values
        for key, layers in each.items()
    }


def _open_trackers(run: Run, setup: Setup) -> AbstractContextManager[Trackers | None]:
    """Return a context manager that yields the trackers of --log, if any."""
    names = setup.config.run.loggers if setup.world.main else ()
    if not names:
        return nullcontext()
    from smallvit.runs.trackers import open_trackers

    return open_trackers(names, run.folder, setup.config.to_dict())


def compile_step(
    run: Run, setup: Setup, signals: SignalHandler, console: Console, step: Callable[[], Tensor]
) -> Tensor:
    """Take the first step, which compiles the model; train uncompiled if that fails and --compile is auto.

    Raises:
        InputError: --compile requests compilation, and it fails.
    """
    loss, reason = setup.compilation.first_step(step, setup.model, lambda: signals.received)
    if reason:
        console.print(f"device not compiled: torch.compile failed ({reason})")
        if setup.world.main:
            run.begin(run.config.replace(compile="off"))
    return loss


def train_step(setup: Setup, epoch: int, step: int, images: Tensor, targets: Tensor) -> Tensor:
    """Update the weights by one batch, or this process's part of it; return its share of the batch's loss."""
    config, model, optimizer = setup.config, setup.model, setup.optimizer
    number = epoch * len(setup.batches) + step + 1
    start = config.optim.sched_start_epoch * len(setup.batches)
    at = number
    if setup.budget is not None:
        at = 1 + round(setup.budget.advance(setup.world) * (setup.steps - 1))
    strength = plugin_strength(at, start or setup.steps, config.optim.plugin_warmup_ratio)
    set_strength(setup, model, strength)
    setup.schedule.step_update(at - start)
    setup.saving.step(at / setup.steps)
    setup.objective.begin_step(at / setup.steps)
    for norm in setup.frozen_norms:
        norm.eval()
    torch.manual_seed(_seed(config.run.seed, MODEL_STREAM, epoch, step, setup.world.rank))
    optimizer.zero_grad()
    if setup.compilation.how == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    loss = backward(setup, images, targets, (setup.augmentation_epoch(epoch), step))
    setup.scaler.unscale_(optimizer)
    if config.optim.clip_grad is not None:
        nn.utils.clip_grad_norm_(setup.trained.parameters(), config.optim.clip_grad)
    applied = setup.scaler.step(optimizer)
    if applied:
        setup.objective.end_step()
    if setup.average is not None:
        if applied:
            setup.average.update(model, number)
        set_strength(setup, setup.average.module, strength)  # a buffer, which is not averaged
    return loss


def backward(setup: Setup, images: Tensor, targets: Tensor, position: tuple[int, int]) -> Tensor:
    """Accumulate the gradients of a batch's mean loss; return this process's share of that loss.

    Args:
        position: Augmentation epoch and step of the batch, by which the teacher's outputs are cached.
    """
    optim, world = setup.config.optim, setup.world
    size = setup.batches.sampling.size
    share = torch.zeros((), device=setup.device)
    parts = list(
        zip(images.tensor_split(optim.grad_accum_steps), targets.tensor_split(optim.grad_accum_steps), strict=True)
    )
    for number, (part, part_targets) in enumerate(parts, 1):
        teacher_outputs = None if setup.teacher is None else setup.teacher(part, (*position, number))
        with distributed.sync_last_backward(setup.replicated, last=number == len(parts)):
            with hardware.autocast(setup.device, setup.dtype):
                outputs = setup.objective(setup.forward, setup.saving.shrink(part), part_targets, teacher_outputs)
            loss = outputs["loss"] * (len(part) / size)
            setup.scaler.scale(loss * world.size).backward()  # gradients are averaged over the processes
        share += loss.detach()
    return share


def evaluate_epoch(setup: Setup, checkpointer: Checkpointer) -> dict[str, Any]:
    """Evaluate an epoch on the validation split, save it if due, and return its metrics."""
    state, model, budget = checkpointer.state, setup.model, setup.budget
    began = budget.elapsed if budget else 0.0
    train_loss = checkpointer.mean_loss()
    checkpointer.tick()
    if setup.world.size > 1:
        for each in (model, setup.eval_model):
            distribute_bn(each, setup.world.size)  # those of the main process, as DDP has them within the epoch
    epoch, optim = state.epoch + 1, setup.config.optim
    due = epoch % optim.val_interval == 0 or epoch == optim.epochs
    if budget is not None:
        skipped = bool(setup.world.agree(int(budget.skips_validation)))
        due = budget.finished or (epoch % optim.val_interval == 0 and not skipped)
    models = [setup.eval_model] if setup.average is None else [setup.eval_model, model]
    results = setup.evaluate_models("val", models, wrap=checkpointer.stop_on_signal) if due else []
    val = results[0] if results else None
    raw = results[1] if len(results) > 1 else None
    metrics = {
        "epoch": state.epoch + 1,
        "train_loss": train_loss,
        "val_loss": val and val["loss"],
        **{f"val_{name}": val and val[name] for name in setup.accuracies},
        **({"thresholds": val and val["thresholds"]} if setup.dataset.label_sets is not None else {}),
        **({} if setup.config.pretrain.labels else {"rank": val and val["rank"]}),
        **({f"val_{setup.accuracies[0]}_raw": raw[setup.accuracies[0]]} if raw else {}),
        **learned_values(setup),
        **({"skipped_steps": setup.scaler.skipped} if setup.scaler.is_enabled() else {}),
        "lr": setup.optimizer.param_groups[0]["lr"],
        "images_per_second": state.step * setup.batches.sampling.size / state.epoch_seconds,
        "seconds": checkpointer.seconds,
    }
    best = due and (val is None or best_epoch([*state.history, metrics], setup.config.run.select_by) is metrics)
    if best:
        state.best_epoch = state.epoch + 1
    checkpointer.epoch(metrics, best)
    if budget is not None:
        budget.end_epoch(budget.elapsed - began, validated=val is not None)
    return metrics


def _seed(*numbers: int) -> int:
    """Derive a seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run: its folder and the contents of its summary.json."""

    folder: Path
    summary: dict[str, Any]

    def load(self, weights: str = "best") -> nn.Module:
        """Load the trained model, best or last, in evaluation mode."""
        return checkpoint.load_model(self.folder, weights)


def summarize(setup: Setup, state: RunState, chosen: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    """Return the contents of summary.json; accuracies in percent."""
    from smallvit.profiling.flops import count_float_bytes, count_packed_bytes

    seen = (state.epoch * len(setup.batches) - state.omitted_steps) * setup.batches.sampling.size
    budget = setup.budget
    best = state.history[chosen["epoch"] - 1]
    return {
        **{f"test_{name}": test[name] for name in (*setup.accuracies, "loss", "images")},
        **{f"val_{name}": best.get(f"val_{name}") for name in (*setup.accuracies, "loss")},
        "select_by": setup.config.run.select_by,
        "imbalance_ratio": setup.dataset.imbalance_ratio,
        "best_epoch": chosen["epoch"],
        "epochs": state.epoch,
        **({"max_seconds": budget.limit} if budget else {}),
        "train_seconds": state.seconds,
        "images_seen": seen,
        **({} if setup.config.pretrain.labels else {"views": setup.seen_views, "rank": test["rank"]}),
        "images_per_second": seen / state.step_seconds,
        "parameters": setup.parameters,
        "macs": setup.operations.macs,
        "bops": setup.operations.bops,
        "ops": setup.operations.ops,
        "packed_bytes": count_packed_bytes(setup.model),
        "float_bytes": count_float_bytes(setup.model),
        "peak_memory_bytes": setup.peaks.training,
        "eval_peak_memory_bytes": setup.peaks.evaluation,
        "device": str(setup.device),
        "processes": setup.world.size,
        "compile": setup.compilation.how,
        "hardware": hardware.describe_hardware(setup.device),
        "precision": setup.precision,
        **({"skipped_steps": setup.scaler.skipped} if setup.scaler.is_enabled() else {}),
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


def print_result(result: TrainResult, console: Console) -> TrainResult:
    """Print the results and the paths of the files."""
    summary, folder = result.summary, result.folder
    primary, epochs = primary_metric([summary]), summary["epochs"]
    name = summary.get("select_by", "top1")
    chosen = f"last of {epochs} epochs"
    if (value := summary.get(f"val_{name}")) is not None:
        title = "" if name == primary else f"{TITLES.get(name, name.replace('_', ' '))} "
        figure = f"{value:.3f}" if name == "loss" else f"{value:.2f} %"
        chosen = f"validation {title}{figure}, best epoch {summary['best_epoch']} of {epochs}"
    pretrained = "rank" in summary
    if pretrained:
        chosen = f"features use {summary['rank']:.1f} dimensions, last of {epochs} epochs"
    score = summary[f"test_{primary}"]
    console.print(f"\n{chosen}" if score is None else f"\ntest {TITLES[primary]} {score:.2f} %  ({chosen})")
    if means := format_class_means(summary, "test_"):
        console.print(f"test {means}")
    console.print(f"trained  in {summary['train_seconds']:.0f} s, {summary['images_per_second']:,.0f} images/s")
    for label, line in (
        *(("weights", folder / Run.BEST), ("curves", folder / Run.CURVES), ("summary", folder / Run.SUMMARY)),
        *(PRETRAINED if pretrained else TRAINED),
    ):
        console.print(f"{label:8} {line}".replace("RUN", str(folder)), soft_wrap=True)  # in one line, to be copied
    return result
