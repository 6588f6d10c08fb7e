"""Images per second of the whole training step, side by side with its plain form, as the field's scripts have it.

    python benchmarks/train_step.py [--arch vit] [--plugins both] [--no-compile] [--repeats 7] [--batch-size 128]
    python benchmarks/train_step.py --compile-cost [--arch vit cait pit swin t2t]

            plain                                            ours
    model   `plain.PlainViT`: four shifted copies, einsum    timm's, with the plugins of smallvit
    loss    F.cross_entropy                                  objectives.supervised
    step    fp32, eager, torch's AdamW as it comes (on       fp32 and bf16, eager and compiled, the fused AdamW of
            CPUs a loop over the parameters)                 `optim`, with and without the weights' moving average
    input   torchvision's transforms, image by image, in     `datasets.loaders.TrainingBatches`, the preset `paper`
            this process; Mixup and CutMix per batch

A model step begins with a batch on the device. It is fair because the same weights give the same logits in both
models (tests/test_benchmarks.py), batch, label smoothing and hyperparameters are the same, and so is the number of
threads, torch's own choice. All forms take turns within each round, so that a busy machine slows them alike; printed
are medians over the rounds, and medians of the rounds' ratios to the plain form. A graph break, compiling after the
first steps and dynamo's silent return to eager are errors, not figures.

What favours ours: where cores are idle, as beside a GPU, a loader's workers would hide part of the plain input. What
favours plain: of the field's ways it takes the faster ones. Only `vit` has a plain form; for the other architectures
a row that says so stands in, ours in fp32, eager, with the plain AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch._dynamo
import torch.nn.functional as F
from input import MEAN, STD, PerImage
from PIL import Image
from plain import PlainViT
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import smallvit
from smallvit.datasets.augment import Augment
from smallvit.datasets.images import ImageDataset, Images
from smallvit.datasets.loaders import TrainingBatches
from smallvit.hardware import autocast, describe_hardware, pick_device, pick_dtype
from smallvit.models import TINY_SIZE, patch_for
from smallvit.objectives import supervised
from smallvit.optim import create_average, create_optimizer
from smallvit.options import AugmentConfig, OptimConfig
from smallvit.plugins import set_fused_attention
from smallvit.profile import count_macs
from smallvit.published import PUBLISHED

CLASSES = 100
OPTIM = OptimConfig(weight_decay=0.05, smoothing=0.1, ema=0.999)
PLUGINS = {"both": (False, True), "off": (False,), "on": (True,)}
BATCHES = 16
"""Batches of images to draw from."""
WARM_UP = 2
"""Rounds that are not counted."""
STEPS = {"cpu": 1, "gpu": 10}
"""Steps of a form's turn; a GPU is waited for after the last, as in training, where the host runs ahead."""
SQUARES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192, 16384)}
"""Sides of the matrices whose product shows the machine's peak."""
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CAPTION = """\
x plain: times as fast as the plain form of the same part. Of peak: share of the rate at which this machine multiplies \
large square matrices in that precision, counting 6 FLOPs for each multiply-accumulate of our model's forward pass \
(2 forward, twice that backward). First step: what compiling adds to it, nothing cached; the first of a process also \
loads the compiler."""
STAND_IN = "Stand-in: this model has no independent plain form; x plain then says what precision and compiling do."

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What all forms of a run have in common."""

    arch: str
    device: torch.device
    size: int
    batch: int
    repeats: int

    @property
    def place(self) -> str:
        """cpu or gpu."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    def fixed_batch(self) -> Batch:
        """Normalised images and label distributions, on the device."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return images.to(self.device), torch.rand(self.batch, CLASSES, generator=generator).softmax(1).to(self.device)

    def seconds(self, call: Callable[[], None], steps: int = 1) -> float:
        """How long a call takes, the device's work included: mean of `steps` in a row."""
        started = time.perf_counter()
        for _ in range(steps):
            call()
        if self.place == "gpu":
            torch.accelerator.synchronize(self.device)
        return (time.perf_counter() - started) / steps


@dataclass(frozen=True)
class Form:
    """A way to compute the step."""

    dtype: torch.dtype = torch.float32
    compiled: bool = False
    plain: bool = False

    def name(self, arch: str) -> str:
        """What the table calls it."""
        if self.plain and arch != "vit":
            return "stand-in: ours fp32, plain AdamW"
        whose = "plain" if self.plain else "ours"
        return f"{whose} {PRECISION[self.dtype]} {'compiled' if self.compiled else 'eager'}"


class Trainer:
    """A fresh model with its optimiser and its moving average."""

    def __init__(self, form: Form, plugins: bool, setting: Setting) -> None:
        torch.manual_seed(0)
        self.form, self.device = form, setting.device
        self.model = build(form, plugins, setting)
        if form.plain:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
        else:
            self.optimizer = create_optimizer(self.model, OPTIM)
        self.average, self.updates = create_average(self.model, OPTIM), 0
        self.call = torch.compile(self.model, fullgraph=True) if form.compiled else self.model

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Forward."""
        if self.form.plain:
            return F.cross_entropy(self.call(images), targets, label_smoothing=OPTIM.smoothing)
        with autocast(self.device, self.form.dtype):
            return supervised(self.call, images, targets, smoothing=OPTIM.smoothing)["loss"]

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.loss(images, targets).backward()
        self.optimizer.step()

    def averaged_step(self, images: Tensor, targets: Tensor) -> None:
        """One training step, which the moving average follows."""
        self.step(images, targets)
        self.updates += 1
        self.average.update(self.model, self.updates)


def build(form: Form, plugins: bool, setting: Setting) -> nn.Module:
    """The model of a form, on the device, on the attention path that `smallvit train` takes."""
    sizes = {"img_size": setting.size, "num_classes": CLASSES, "spt": plugins, "lsa": plugins}
    if form.plain and setting.arch == "vit":
        return PlainViT(**sizes, patch_size=patch_for("vit", setting.size)).to(setting.device)
    model = smallvit.create_model(setting.arch, **sizes).to(setting.device)
    set_fused_attention(model, setting.device.type, form.dtype)
    return model


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    plugins: bool
    part: str
    name: str
    form: Form
    macs: int
    """Of an image's forward pass through smallvit's model."""
    call: Callable[[], None]
    first: float | None = None
    """Seconds that compiling adds to the first step."""


def make_rows(setting: Setting, plugins: bool, forms: list[Form], images: Images) -> Iterator[Row]:
    """The model step of each form, then the step with its input."""
    batch, trainers = setting.fixed_batch(), [Trainer(form, plugins, setting) for form in forms]
    macs = count_macs(build(Form(), plugins, setting), 3, setting.size)
    for form, trainer in zip(forms, trainers, strict=True):
        row = partial(Row, plugins, "model step", form=form, macs=macs)
        call = partial(trainer.step, *batch)
        name = form.name(setting.arch)
        yield row(name=name, call=call, first=compile_seconds(call, setting) if form.compiled else None)
        if not form.plain:
            yield row(name=f"{name} + EMA", call=partial(trainer.averaged_step, *batch))
    for form, trainer in zip(forms, trainers, strict=True):
        batches = (plain_batches if form.plain else our_batches)(images, setting)
        name = form.name(setting.arch)
        yield Row(plugins, "with input", name, form, macs, partial(step_on, trainer, batches))


def step_on(trainer: Trainer, batches: Iterator[Batch]) -> None:
    """Fetch a batch and train on it."""
    trainer.step(*next(batches))


def compile_seconds(call: Callable[[], None], setting: Setting) -> float:
    """What a first call takes beyond a second."""
    return setting.seconds(call) - setting.seconds(call)


def synthetic_images(setting: Setting) -> Images:
    """Smooth random images, as photographs are, of CIFAR's form, with random labels."""
    n, side = BATCHES * setting.batch, setting.size // 4 + 1
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, side, side, generator=generator)
    pixels = F.interpolate(coarse, (setting.size, setting.size), mode="bicubic").clamp_(0, 1).mul_(255).byte()
    return Images(pixels, torch.randint(CLASSES, (n,), generator=generator))


def our_batches(images: Images, setting: Setting) -> Iterator[Batch]:
    """Batches as `smallvit train --aug paper` makes them, epoch after epoch."""
    dataset = ImageDataset(
        name="synthetic",
        source="synthetic",
        class_names=tuple(map(str, range(CLASSES))),
        train=images,
        val=images,
        test=images,
        mean=MEAN,
        std=STD,
        flip=True,
        aug="paper",
        policy="cifar10",
        fingerprint="",
    )
    augment = Augment.from_config(AugmentConfig(aug="paper"), setting.size, may_flip=True)
    batches = TrainingBatches(dataset, setting.batch, augment, 0, setting.device)
    return itertools.chain.from_iterable(map(batches.epoch, itertools.count()))


def plain_batches(images: Images, setting: Setting) -> Iterator[Batch]:
    """The same operations by torchvision, on one PIL image after the other; mixing on the batch."""
    theirs = PerImage("paper", images.pixels, images.labels)
    while True:
        for chosen in torch.randperm(len(images)).split(setting.batch):
            x = torch.stack([theirs.transform(Image.fromarray(image)) for image in theirs.images[chosen.numpy()]])
            labels = theirs.labels[chosen]
            if torch.rand(()) < theirs.prob:
                x, targets = theirs.mix(x, labels)
            else:
                targets = F.one_hot(labels, CLASSES).float()
            yield x.to(setting.device), targets.to(setting.device)


def take_turns(rows: Sequence[Row], setting: Setting) -> list[list[float]]:
    """Seconds of a step in each round, for each row."""
    steps, title = STEPS[setting.place], f"{setting.arch}: rounds"
    times: list[list[float]] = [[] for _ in rows]
    for number in track(range(WARM_UP + setting.repeats), title, console=Console(stderr=True), transient=True):
        with torch._dynamo.config.patch(error_on_recompile=number >= WARM_UP):
            for row, measured in zip(rows, times, strict=True):
                measured.append(setting.seconds(row.call, steps))
    return [measured[WARM_UP:] for measured in times]


def matmul_peak(setting: Setting, dtype: torch.dtype) -> float:
    """FLOPs a second of large square matrix products: the best of several sizes, five times each."""
    best = 0.0
    for n in SQUARES[setting.place]:
        left, right = torch.randn(2, n, n, device=setting.device).to(dtype)
        product = torch.empty_like(left)
        taken = min(setting.seconds(partial(torch.mm, left, right, out=product)) for _ in range(5))
        best = max(best, 2 * n**3 / taken)
    return best


def measure(setting: Setting, forms: list[Form], plugins: Sequence[bool], peaks: dict[torch.dtype, float]) -> Table:
    """Let the forms of an architecture take turns; `peaks` in FLOPs a second."""
    images = synthetic_images(setting)
    with cold_cache():
        with Console(stderr=True).status(f"{setting.arch}: first steps"):
            rows = [row for choice in plugins for row in make_rows(setting, choice, forms, images)]
        times = take_turns(rows, setting)
    return tabulate(setting, rows, times, peaks)


def tabulate(setting: Setting, rows: Sequence[Row], times: list[list[float]], peaks: dict[torch.dtype, float]) -> Table:
    """Medians over the rounds, and of the rounds' ratios."""
    plain = {(r.plugins, r.part): measured for r, measured in zip(rows, times, strict=True) if r.form.plain}
    headings = "plugins", "part", "form", "ms a step", "images/s", "x plain", "of peak", "first step"
    table = Table(*headings, title=f"{setting.arch}, {setting.size} px, batch {setting.batch}")
    for row, measured in zip(rows, times, strict=True):
        taken, base = statistics.median(measured), plain[row.plugins, row.part]
        if row.form.plain:
            table.add_section()
        table.add_row(
            "SPT + LSA" if row.plugins else "none",
            row.part,
            row.name,
            f"{1e3 * taken:.1f}",
            f"{setting.batch / taken:,.0f}",
            f"{statistics.median(b / t for b, t in zip(base, measured, strict=True)):.2f}",
            f"{100 * 6 * row.macs * setting.batch / taken / peaks[row.form.dtype]:.0f} %",
            "" if row.first is None else f"+ {row.first:.1f} s",
        )
    return table


@contextmanager
def cold_cache() -> Iterator[None]:
    """While it is on, compiled code is kept in a folder of its own, and compiling that ends in eager code fails."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        yield
    torch.compiler.reset()


def compile_cost(setting: Setting, plugins: bool) -> tuple[float, float, float]:
    """Seconds that compiling adds to the first step, and seconds of an eager and of a compiled step."""
    dtype = pick_dtype(setting.device, "auto")
    batch = setting.fixed_batch()
    eager, compiled = (Form(dtype), Form(dtype, compiled=True))
    with cold_cache():
        calls = [partial(Trainer(form, plugins, setting).step, *batch) for form in (eager, compiled)]
        first = compile_seconds(calls[1], setting)
        rows = [Row(plugins, "", "", form, 0, call) for form, call in zip((eager, compiled), calls, strict=True)]
        before, after = map(statistics.median, take_turns(rows, setting))
    return first, before, after


def measure_compiling(settings: list[Setting], plugins: bool) -> Table:
    """When compiling pays, each architecture in a fresh process: nothing of the compiler is loaded there yet."""
    precision = PRECISION[pick_dtype(settings[0].device, "auto")]
    title = f"compiling, {'with SPT + LSA' if plugins else 'without plugins'}, {precision}, batch {settings[0].batch}"
    table = Table("model", "compiling, s", "ms eager", "ms compiled", "pays after", title=title)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for setting in settings:
            first, eager, compiled = processes.submit(compile_cost, setting, plugins).result()
            pays = f"{first / (eager - compiled):,.0f} steps" if compiled < eager else "never"
            table.add_row(setting.arch, f"{first:.1f}", f"{1e3 * eager:.1f}", f"{1e3 * compiled:.1f}", pays)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["vit"], choices=PUBLISHED)
    parser.add_argument("--plugins", default="both", choices=PLUGINS)
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction, help="also compiled")
    parser.add_argument("--compile-cost", action="store_true", help="only when compiling pays (both: with the plugins)")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(argv)
    if given.img_size <= TINY_SIZE:
        parser.error(f"--img-size {given.img_size}: expected more than {TINY_SIZE} px, up to which vit is another one")
    return given


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    device, plugins = pick_device(given.device), PLUGINS[given.plugins]
    settings = [Setting(arch, device, given.img_size, given.batch_size, given.repeats) for arch in given.arch]
    console = Console(highlight=False)
    console.width = max(120, console.width)  # also where the output goes to a file
    if given.compile_cost:
        console.print(measure_compiling(settings, plugins[-1]))
    else:
        dtypes = list(dict.fromkeys([torch.float32, pick_dtype(device, "auto")]))
        forms = [Form(plain=True), *map(Form, dtypes), *([Form(dtypes[-1], compiled=True)] if given.compile else [])]
        peaks = {dtype: matmul_peak(settings[0], dtype) for dtype in dtypes}
        for setting in settings:
            console.print(measure(setting, forms, plugins, peaks))
        console.print(CAPTION if given.arch == ["vit"] else f"{CAPTION} {STAND_IN}")
        rates = ", ".join(f"{PRECISION[dtype]} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in peaks.items())
        console.print(f"Peak: {rates}")
    threads = "" if device.type == "cpu" else f", {torch.get_num_threads()} threads"
    console.print(f"{describe_hardware(device)}{threads}, torch {torch.__version__}, medians of {given.repeats}")
    console.print(shlex.join(["python", "benchmarks/train_step.py", *argv]))


if __name__ == "__main__":
    main()
