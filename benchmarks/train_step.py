"""Compare the images per second of a training step with a plain PyTorch implementation of it.

    python benchmarks/train_step.py [--arch vit] [--plugins both] [--no-compile] [--rounds 7] [--batch-size 128]
    python benchmarks/train_step.py --compile-cost [--arch vit cait pit swin t2t]

            plain                                            ours
    model   `plain.PlainViT`: four shifted copies, einsum    timm's, with the plugins of smallvit
    loss    F.cross_entropy                                  losses.create_objective
    step    fp32, eager, torch's AdamW with its defaults     fp32 and bf16, eager and compiled, the fused AdamW of
            (on CPUs a loop over the parameters)             `optim`, with and without the weights' moving average
    input   torchvision's transforms, image by image, in     `datasets.loader.InMemoryLoader`, the preset `lee2021`
            this process; Mixup and CutMix per batch

A model step starts from a batch on the device. The same weights give the same logits in both models
(tests/test_benchmarks.py); batch, label smoothing, hyperparameters and number of threads are the same. All forms take
turns within each round. The table has medians over the rounds, and medians of the rounds' ratios to the plain form.
A graph break, a recompilation after the first steps or dynamo's silent fall-back to eager is an error.

In favor of ours: with idle cores, as next to a GPU, the workers of a data loader would hide part of the plain input.
In favor of plain: where there are two common ways it takes the faster one. Only `vit` has a plain form; for the other
architectures a row with our model in fp32, eager, with the plain AdamW stands in, and says so.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch._dynamo
import torch.nn.functional as F
from common import (
    describe_machine,
    measure_in_turns,
    measure_seconds,
    median_ratio,
    options_parser,
    smooth_images,
    wide_console,
)
from input import CLASSES, MEAN, STD, PerImage
from PIL import Image
from plain import PlainViT
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import smallvit
from smallvit.config.options import AugmentConfig, OptimConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.dataset import ImageDataset, Images
from smallvit.datasets.loader import InMemoryLoader
from smallvit.models.architectures import LEE2021
from smallvit.models.factory import TINY_SIZE, default_patch_size
from smallvit.plugins.sdpa import set_fused_attention
from smallvit.profiling.flops import count_macs
from smallvit.training.losses import create_objective
from smallvit.training.optim import create_average, create_optimizer
from smallvit.utils.hardware import autocast, pick_device, pick_dtype

OPTIM = OptimConfig(weight_decay=0.05, label_smoothing=0.1, ema_decay=0.999)
PLUGINS = {"both": (False, True), "off": (False,), "on": (True,)}
BATCHES = 16
"""Batches of images to draw from."""
WARM_UP = 2
"""Rounds that are not measured."""
STEPS = {"cpu": 1, "gpu": 10}
"""Steps per turn; a GPU is synchronized after the last one, as the host runs ahead in training too."""
SQUARES = {"cpu": (512, 1024, 2048), "gpu": (4096, 8192, 16384)}
"""Sides of the square matrices whose product measures the machine's peak."""
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CAPTION = """\
x plain: speedup over the plain form of the same part. Of peak: share of the rate at which this machine multiplies \
large square matrices in that precision, with 6 FLOPs per multiply-accumulate of our model's forward pass (2 forward, \
4 backward). First step: what compilation adds to it, without a cache; the first of a process loads the compiler too."""
STAND_IN = "Stand-in: this model has no independent plain form; x plain then measures precision and compilation only."

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Settings that all forms of a run share."""

    arch: str
    device: torch.device
    size: int
    batch: int
    rounds: int

    @property
    def device_kind(self) -> str:
        """cpu or gpu."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    def fixed_batch(self) -> Batch:
        """Return normalized images and label distributions on the device."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return images.to(self.device), torch.rand(self.batch, CLASSES, generator=generator).softmax(1).to(self.device)


@dataclass(frozen=True)
class Form:
    """An implementation of the step."""

    dtype: torch.dtype = torch.float32
    compiled: bool = False
    plain: bool = False

    def name(self, arch: str) -> str:
        """Return the name in the table."""
        if self.plain and arch != "vit":
            return "stand-in: ours fp32, plain AdamW"
        whose = "plain" if self.plain else "ours"
        return f"{whose} {PRECISION[self.dtype]} {'compiled' if self.compiled else 'eager'}"


class Trainer:
    """A new model with its optimizer and its moving average."""

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
        """Compute the loss."""
        if self.form.plain:
            return F.cross_entropy(self.call(images), targets, label_smoothing=OPTIM.label_smoothing)
        with autocast(self.device, self.form.dtype):
            return create_objective(OPTIM)(self.call, images, targets)["loss"]

    def step(self, images: Tensor, targets: Tensor) -> None:
        """Take a training step."""
        self.optimizer.zero_grad()
        self.loss(images, targets).backward()
        self.optimizer.step()

    def step_with_ema(self, images: Tensor, targets: Tensor) -> None:
        """Take a training step and update the moving average."""
        self.step(images, targets)
        self.updates += 1
        self.average.update(self.model, self.updates)


def build(form: Form, plugins: bool, setting: Setting) -> nn.Module:
    """Build the model of a form on the device, with the attention path that `smallvit train` uses."""
    sizes, chosen = {"img_size": setting.size, "num_classes": CLASSES}, {"spt": plugins, "lsa": plugins}
    if form.plain and setting.arch == "vit":
        patch_size = default_patch_size("vit", setting.size)
        return PlainViT(**sizes, **chosen, patch_size=patch_size).to(setting.device)
    model = smallvit.create_model(setting.arch, plugins=chosen, **sizes).to(setting.device)
    set_fused_attention(model, setting.device.type, form.dtype)
    return model


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    plugins: bool
    part: str
    name: str
    form: Form
    macs: int
    """Multiply-accumulates of an image's forward pass through smallvit's model."""
    call: Callable[[], None]
    first: float | None = None
    """Seconds that compiling adds to the first step."""


def make_rows(setting: Setting, plugins: bool, forms: list[Form], images: Images) -> Iterator[Row]:
    """Yield the model step of each form, then the step with its input."""
    batch, trainers = setting.fixed_batch(), [Trainer(form, plugins, setting) for form in forms]
    macs = count_macs(build(Form(), plugins, setting), 3, setting.size)
    for form, trainer in zip(forms, trainers, strict=True):
        row = partial(Row, plugins, "model step", form=form, macs=macs)
        call = partial(trainer.step, *batch)
        name = form.name(setting.arch)
        yield row(name=name, call=call, first=compile_seconds(call, setting) if form.compiled else None)
        if not form.plain:
            yield row(name=f"{name} + EMA", call=partial(trainer.step_with_ema, *batch))
    for form, trainer in zip(forms, trainers, strict=True):
        batches = (plain_batches if form.plain else our_batches)(images, setting)
        name = form.name(setting.arch)
        yield Row(plugins, "with input", name, form, macs, partial(step_on, trainer, batches))


def step_on(trainer: Trainer, batches: Iterator[Batch]) -> None:
    """Fetch a batch and train on it."""
    trainer.step(*next(batches))


def compile_seconds(call: Callable[[], None], setting: Setting) -> float:
    """Return the extra seconds of a first call over a second one."""
    return measure_seconds(call, setting.device) - measure_seconds(call, setting.device)


def synthetic_images(setting: Setting) -> Images:
    """Return smooth random images of CIFAR's form with random labels."""
    n = BATCHES * setting.batch
    labels = torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(0))
    return Images(smooth_images(n, setting.size), labels)


def our_batches(images: Images, setting: Setting) -> Iterator[Batch]:
    """Return batches as `smallvit train --aug lee2021` makes them, epoch after epoch."""
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
        aug="lee2021",
        policy="cifar10",
        fingerprint="",
    )
    augment = Augment.from_config(AugmentConfig(aug="lee2021"), setting.size, flip=True)
    batches = InMemoryLoader(dataset, setting.batch, augment, 0, setting.device)
    return itertools.chain.from_iterable(map(batches.epoch, itertools.count()))


def plain_batches(images: Images, setting: Setting) -> Iterator[Batch]:
    """Yield batches augmented by torchvision, one PIL image after the other; mixing on the batch."""
    theirs = PerImage("lee2021", images.pixels, images.labels)
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
    """Return the seconds of a step in each round, for each row; recompilation after the warm-up is an error."""
    calls = {index: row.call for index, row in enumerate(rows)}
    arguments = {"device": setting.device, "steps": STEPS[setting.device_kind], "title": f"{setting.arch}: rounds"}
    measure_in_turns(calls, WARM_UP, warm_up=0, **arguments)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return list(measure_in_turns(calls, setting.rounds, warm_up=0, **arguments).values())


def matmul_peak(setting: Setting, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of large square matrix products: the best of several sizes, five times each."""
    best = 0.0
    for n in SQUARES[setting.device_kind]:
        left, right = torch.randn(2, n, n, device=setting.device).to(dtype)
        product = torch.empty_like(left)
        call = partial(torch.mm, left, right, out=product)
        best = max(best, 2 * n**3 / min(measure_seconds(call, setting.device) for _ in range(5)))
    return best


def measure(setting: Setting, forms: list[Form], plugins: Sequence[bool], peaks: dict[torch.dtype, float]) -> Table:
    """Measure the forms of an architecture in turns; `peaks` are in FLOPs per second."""
    images = synthetic_images(setting)
    with cold_cache():
        with Console(stderr=True).status(f"{setting.arch}: first steps"):
            rows = [row for choice in plugins for row in make_rows(setting, choice, forms, images)]
        times = take_turns(rows, setting)
    return tabulate(setting, rows, times, peaks)


def tabulate(setting: Setting, rows: Sequence[Row], times: list[list[float]], peaks: dict[torch.dtype, float]) -> Table:
    """Return the table of medians over the rounds, and of the rounds' ratios."""
    plain = {(r.plugins, r.part): measured for r, measured in zip(rows, times, strict=True) if r.form.plain}
    headings = "plugins", "part", "form", "ms per step", "images/s", "x plain", "of peak", "first step"
    table = Table(*headings, title=f"{setting.arch}, {setting.size} px, batch {setting.batch}")
    for row, measured in zip(rows, times, strict=True):
        seconds = statistics.median(measured)
        if row.form.plain:
            table.add_section()
        table.add_row(
            "SPT + LSA" if row.plugins else "none",
            row.part,
            row.name,
            f"{1e3 * seconds:.1f}",
            f"{setting.batch / seconds:,.0f}",
            f"{median_ratio(plain[row.plugins, row.part], measured):.2f}",
            f"{100 * 6 * row.macs * setting.batch / seconds / peaks[row.form.dtype]:.0f} %",
            "" if row.first is None else f"+ {row.first:.1f} s",
        )
    return table


@contextmanager
def cold_cache() -> Iterator[None]:
    """Use an empty cache for compiled code, and make dynamo's fall-back to eager an error."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        yield
    torch.compiler.reset()


def compile_cost(setting: Setting, plugins: bool) -> tuple[float, float, float]:
    """Return the seconds that compilation adds to the first step, and those of an eager and of a compiled step."""
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
    """Measure after how many steps compilation pays off, each architecture in a new process."""
    precision = PRECISION[pick_dtype(settings[0].device, "auto")]
    title = f"compilation, {'with SPT + LSA' if plugins else 'without plugins'}, {precision}, batch {settings[0].batch}"
    table = Table("model", "compilation, s", "ms eager", "ms compiled", "pays off after", title=title)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for setting in settings:
            first, eager, compiled = processes.submit(compile_cost, setting, plugins).result()
            pays_off = f"{first / (eager - compiled):,.0f} steps" if compiled < eager else "never"
            table.add_row(setting.arch, f"{first:.1f}", f"{1e3 * eager:.1f}", f"{1e3 * compiled:.1f}", pays_off)
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = options_parser(__doc__)
    parser.add_argument("--arch", nargs="+", default=["vit"], choices=LEE2021)
    parser.add_argument("--plugins", default="both", choices=PLUGINS)
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction, help="also compiled")
    parser.add_argument(
        "--compile-cost",
        action="store_true",
        help="only measure when compilation pays off (with the plugins for --plugins both)",
    )
    options = parser.parse_args(argv)
    if options.img_size <= TINY_SIZE:
        parser.error(
            f"--img-size {options.img_size}: expected more than {TINY_SIZE}; vit is another model for smaller images"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    device, plugins = pick_device(options.device), PLUGINS[options.plugins]
    settings = [Setting(arch, device, options.img_size, options.batch_size, options.rounds) for arch in options.arch]
    console = wide_console()
    if options.compile_cost:
        console.print(measure_compiling(settings, plugins[-1]))
    else:
        dtypes = list(dict.fromkeys([torch.float32, pick_dtype(device, "auto")]))
        forms = [Form(plain=True), *map(Form, dtypes), *([Form(dtypes[-1], compiled=True)] if options.compile else [])]
        peaks = {dtype: matmul_peak(settings[0], dtype) for dtype in dtypes}
        for setting in settings:
            console.print(measure(setting, forms, plugins, peaks))
        console.print(CAPTION if options.arch == ["vit"] else f"{CAPTION} {STAND_IN}")
        rates = ", ".join(f"{PRECISION[dtype]} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in peaks.items())
        console.print(f"Peak: {rates}")
    console.print(f"{describe_machine(device)}, medians of {options.rounds}")
    console.print(shlex.join(["python", "benchmarks/train_step.py", *argv]))


if __name__ == "__main__":
    main()
