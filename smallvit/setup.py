"""What a run trains with: data, model and optimiser, put together from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smallvit import (
    checkpoint,
    compiling,
    datasets,
    distributed,
    hardware,
    initial,
    models,
    objectives,
    optim,
    teachers,
    trained,
)
from smallvit.config import Config
from smallvit.costs.bits import Operations, operations
from smallvit.datasets.augment import Augment
from smallvit.datasets.batches import Batches
from smallvit.datasets.loaders import TrainingBatches, evaluation_batches
from smallvit.datasets.sampling import share
from smallvit.datasets.streaming import Files, StreamedBatches
from smallvit.distributed import World
from smallvit.errors import InputError
from smallvit.evaluate import batch_size, evaluate
from smallvit.inherit import inherited
from smallvit.plugins import describe, set_distilled_training, set_fused_attention
from smallvit.precision import sound_dtype
from smallvit.profile import count_parameters, macs_by_layer
from smallvit.regularise import regularised
from smallvit.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run trains with."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products: bfloat16 under mixed precision."""
    dataset: datasets.ImageDataset
    batches: Batches
    spec: dict[str, Any]
    """The arguments of `create_model` that made the model."""
    model: nn.Module
    replicated: nn.Module
    """The model, its gradients averaged over torchrun's processes."""
    forward: nn.Module
    """The same, compiled where that pays: what training calls."""
    operations: Operations
    """Of one image's forward pass."""
    parameters: int
    still: tuple[nn.Module, ...]
    """Batch norms whose statistics stay as they are."""
    notes: tuple[str, ...]
    """What a person should know about the weights that the model begins with."""
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    average: ModelEmaV3 | None
    """The weights' moving average."""
    teacher: Teacher | None
    """The trained model whose answers are learnt too."""
    world: World
    """torchrun's processes."""

    @property
    def objective(self) -> Callable[..., dict[str, Tensor]]:
        """What training minimises: a function of model, images, targets, and the teacher's logits where it has one."""
        labels = {"smoothing": self.config.optim.smoothing, "loss": self.config.optim.loss}
        if self.teacher is None:
            return partial(objectives.supervised, **labels)
        return partial(objectives.distilled, **labels, **teachers.distillation(self.config.distill))

    def views(self, epoch: int) -> int:
        """The epoch whose views of the images an epoch shows: itself, unless they come again."""
        return epoch % (self.config.distill.teacher_views or epoch + 1)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.config.optim.epochs * len(self.batches)

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the images of val or test, as they are."""
        size = batch_size(self.device)
        return evaluation_batches(self.dataset, split, self.device, size, self.world.rank, self.world.size)

    @property
    def judged(self) -> nn.Module:
        """The model that is judged and saved: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    def evaluate(
        self,
        split: str,
        *,
        model: nn.Module | None = None,
        flip: bool = False,
        watch: Callable[[Iterable[Any]], Iterator[Any]] = iter,
    ) -> dict[str, float] | None:
        """How well a model (the judged one) does on val or test; nothing where the split has no images."""
        if not len(getattr(self.dataset, split)):
            return None
        batches = watch(self.evaluation_batches(split))
        total = self.world.total
        return evaluate(model or self.judged, batches, self.device, self.dtype, flip=flip, total=total)

    def load_judged(self, weights: dict[str, Tensor]) -> None:
        """Give weights to the model that is judged."""
        checkpoint.fill(self.judged, weights)

    def metadata(self, epoch: int, val_top1: float | None) -> dict[str, Any]:
        """What a weights file says about itself."""
        data = {name: getattr(self.dataset, name) for name in ("name", "class_names", "mean", "std")}
        data["learnt"] = trained.identity(self.dataset)
        data |= {split: trained.held_out(self.dataset, self.config.data, split) for split in trained.DRAWN}
        return {"model": self.spec, "data": data, "epoch": epoch, "val_top1": val_top1}

    def announce(self, console: Console) -> None:
        """Show what is trained on what, in a few lines."""
        data = self.dataset
        sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in ("train", "val", "test"))
        console.print(f"data   {data.name}: {len(data.class_names)} classes, {sizes}")
        for note in data.notes:
            console.print(f"       {note}")
        arch, patch_size, fit = (self.spec[name] for name in ("arch", "patch_size", "fit"))
        console.print(f"model  {models.describe_choice(arch, data.img_size, patch_size, fit=fit)}")
        console.print(f"       {describe(self.model)}".replace("\n", "\n       "))
        for note in self.notes:
            console.print(f"init   {note}")
        if self.teacher is not None:
            console.print(f"teacher {self.teacher.describe()}")
        how = compiling.IN_WORDS[self.config.compute.compile]
        many = f"{self.world.size} processes, each with " if self.world.size > 1 else ""
        console.print(f"device {many}{self.device}: {hardware.describe_hardware(self.device)}, {self.precision}{how}")


def prepare(config: Config, world: World = World(), *, begins: bool = True) -> Setup:  # noqa: B008, it is frozen
    """Data, model and optimiser of a run, the model initialised from the run's seed, or by trained weights.

    These are left alone where the run does not begin, but goes on.

    Raises:
        InputError: something that the configuration names is not there or does not fit.
    """
    config = regularised(config if config.model.arch is not None else inherited(config))  # for a direct call
    device = world.device(hardware.pick_device(config.compute.device))

    if not world.main:  # the main process downloads, decodes, checks and decides before the others begin
        config = config.replace(**world.send({}))
    models.require_known(config.model.arch)  # before images are decoded
    dataset = datasets.load(config.data)
    streaming = "on" if isinstance(dataset.train, Files) else "off"
    batches = _batches(config, dataset, device, world)
    spec = _spec(config, dataset)
    torch.manual_seed(config.run.seed)  # the initial weights
    model = models.create_model(**spec)
    origin = config.init.init
    notes = [initial.begin(model, spec, origin, dataset, config.data)] if origin is not None and begins else []
    counted = operations(model, macs_by_layer(model, dataset.in_chans, dataset.img_size))
    _require_images(config, batches, model, world)
    dtype = sound_dtype(device, config.compute.amp, model, dataset.in_chans, dataset.img_size)
    work = config.optim.epochs * batches.sampling.views // world.size
    how = compiling.decide(config.compute.compile, device, counted.macs, work)
    teacher = teachers.engage(config, dataset, device, how, batches.sampling.views // world.size)
    parameters = count_parameters(model)
    initial.freeze(model, config.init.frozen)
    if world.main:
        world.send({"streaming": streaming, "compile": how})

    set_distilled_training(model, enable=config.distill.distill == "token")
    set_fused_attention(model, device.type, dtype)
    model, average = _place(model, config, device, world)
    replicated = distributed.replicate(model, world, device)

    optimizer = optim.create_optimizer(model, config.optim)
    return Setup(
        config=config.replace(data=dataset.source, streaming=streaming, compile=how),
        device=device,
        dtype=dtype,
        dataset=dataset,
        batches=batches,
        spec=spec,
        model=model,
        replicated=replicated,
        forward=compiling.compiled(replicated, how),
        operations=counted,
        optimizer=optimizer,
        schedule=optim.create_schedule(optimizer, config.optim, config.optim.epochs * len(batches)),
        parameters=parameters,
        still=initial.still_norms(model),
        notes=tuple(notes),
        average=average,
        teacher=teacher,
        world=world,
    )


def _batches(config: Config, dataset: datasets.ImageDataset, device: torch.device, world: World) -> Batches:
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    form = StreamedBatches if isinstance(dataset.train, Files) else TrainingBatches
    part = {"balanced": config.data.balanced, "rank": world.rank, "world": world.size}
    return form(dataset, config.optim.batch_size, augment, config.run.seed, device, **part)


def _place(model: nn.Module, config: Config, device: torch.device, world: World) -> tuple[nn.Module, ModelEmaV3 | None]:
    """The model where it trains, and its moving average."""
    compute = config.compute
    if not compute.fsdp:
        model.to(device)
        if compiling.is_convolutional(model):
            model.to(memory_format=torch.channels_last)
    if compute.grad_checkpointing:
        models.checkpoint_gradients(model, config.model.arch)
    if compute.sync_bn:
        model = distributed.synchronise_bn(model, world, device)
    average = optim.create_average(model, config.optim)
    if compute.fsdp:
        for each in [model] if average is None else [model, average.module]:
            distributed.shard(each, world, device)
    return model, average


def _spec(config: Config, dataset: datasets.ImageDataset) -> dict[str, Any]:
    """The arguments of `create_model`."""
    model = config.model
    return asdict(model) | {
        "arch": models.resolved(model.arch, dataset.img_size, fit=model.fit),
        "img_size": dataset.img_size,
        "in_chans": dataset.in_chans,
        "num_classes": len(dataset.class_names),
        "dist_token": model.dist_token or config.distill.distill == "token",
        "patch_size": model.patch_size or models.patch_for(model.arch, dataset.img_size, fit=model.fit),
    }


def _require_images(config: Config, batches: Batches, model: nn.Module, world: World) -> None:
    """Check that each part of a batch that is computed at once holds an image, or two for batch norm."""
    size, parts = batches.sampling.size, config.optim.accumulate
    smallest = min(len(range(size)[share(size, rank, world.size)]) for rank in range(world.size)) // parts
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    if smallest < 1 + normed:
        why = f": {config.model.arch} has batch norm, which needs 2 in each" if normed else ""
        raise InputError(
            f"--batch-size {config.optim.batch_size}: steps of {size} images are too few for {parts * world.size} "
            f"parts{why}; give more, or fewer parts (--accumulate, torchrun's processes)"
        )
