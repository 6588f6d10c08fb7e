"""What a run trains with: data, model and optimiser, put together from a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smallvit import datasets, hardware, models, optim
from smallvit.config import Config
from smallvit.datasets.augment import Augment
from smallvit.datasets.batches import Batches
from smallvit.datasets.loaders import TrainingBatches, evaluation_batches
from smallvit.datasets.streaming import Files, StreamedBatches
from smallvit.errors import InputError
from smallvit.evaluate import evaluate
from smallvit.plugins import describe, set_fused_attention
from smallvit.profile import count_macs
from smallvit.regularise import regularised

EVALUATION_BATCH = {"cpu": 128, "gpu": 1024}
"""Images at once; on CPUs the cache decides."""


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
    macs: int
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    average: ModelEmaV3 | None
    """The weights' moving average."""

    @property
    def precision(self) -> str:
        """bf16 or fp32."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of val or test, as they are."""
        size = EVALUATION_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        return evaluation_batches(self.dataset, split, self.device, size)

    @property
    def judged(self) -> nn.Module:
        """The model that is judged and saved: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    def evaluate(self, split: str, *, model: nn.Module | None = None, flip: bool = False) -> dict[str, float] | None:
        """How well a model (the judged one) does on val or test; nothing where the split has no images."""
        if not len(getattr(self.dataset, split)):
            return None
        return evaluate(model or self.judged, self.evaluation_batches(split), self.device, self.dtype, flip=flip)

    def metadata(self, epoch: int, val_top1: float | None) -> dict[str, Any]:
        """What a weights file says about itself."""
        data = {name: getattr(self.dataset, name) for name in ("name", "class_names", "mean", "std")}
        return {"model": self.spec, "data": data, "epoch": epoch, "val_top1": val_top1}

    def announce(self, console: Console) -> None:
        """Show what is trained on what, in a few lines."""
        data = self.dataset
        sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in ("train", "val", "test"))
        console.print(f"data   {data.name}: {len(data.class_names)} classes, {sizes}")
        for note in data.notes:
            console.print(f"       {note}")
        console.print(f"model  {models.describe_choice(self.spec['arch'], data.img_size, self.spec['patch_size'])}")
        console.print(f"       {describe(self.model)}".replace("\n", "\n       "))
        console.print(f"device {self.device}: {hardware.describe_hardware(self.device)}, {self.precision}")


def prepare(config: Config) -> Setup:
    """Data, model and optimiser of a run, the model freshly initialised from the run's seed.

    Raises:
        InputError: something that the configuration names is not there or does not fit.
    """
    models.require_known(config.model.arch)  # before images are decoded
    config = regularised(config)
    device = hardware.pick_device(config.compute.device)
    dtype = hardware.pick_dtype(device, config.compute.amp)

    dataset = datasets.load(config.data)
    augment = Augment.from_config(config.augment, dataset.img_size, dataset.flip, dataset.aug, dataset.policy)
    form = StreamedBatches if isinstance(dataset.train, Files) else TrainingBatches
    batches = form(dataset, config.optim.batch_size, augment, config.run.seed, device, balanced=config.data.balanced)

    torch.manual_seed(config.run.seed)  # the initial weights
    spec = asdict(config.model) | {
        "img_size": dataset.img_size,
        "in_chans": dataset.in_chans,
        "num_classes": len(dataset.class_names),
        "patch_size": config.model.patch_size or models.patch_for(config.model.arch, dataset.img_size),
    }
    model = models.create_model(**spec)
    macs = count_macs(model, dataset.in_chans, dataset.img_size)
    if len(batches.sampling.batches(0)[-1]) < 2 and any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise InputError(f"--batch-size {config.optim.batch_size}: {spec['arch']} has batch norm, which needs 2 images")
    model.to(device)
    set_fused_attention(model, device.type, dtype)

    optimizer = optim.create_optimizer(model, config.optim)
    return Setup(
        config=config.replace(data=dataset.source, streaming="on" if isinstance(dataset.train, Files) else "off"),
        device=device,
        dtype=dtype,
        dataset=dataset,
        batches=batches,
        spec=spec,
        model=model,
        macs=macs,
        optimizer=optimizer,
        schedule=optim.create_schedule(optimizer, config.optim, config.optim.epochs * len(batches)),
        average=optim.create_average(model, config.optim),
    )
