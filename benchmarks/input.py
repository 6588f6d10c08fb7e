"""Compare the augmentation presets in images per second, with torchvision's transforms image by image.

    python benchmarks/input.py [--aug basic lee2021] [--batch-size 512] [--img-size 32] [--rounds 15]

Both forms start from uint8 images in memory and end with a normalized batch and its label distributions on the device.
The per-image form runs in one process, as a worker of a data loader would; it exists for the presets that torchvision
can express. The forms take turns within each round; the table has medians over the rounds and medians of the rounds'
ratios. The last columns are a batch's share of a training step (the 32 px ViT with SPT and LSA, batch size 128, in the
precision of `--amp auto`) and the peak memory of augmenting a batch.
"""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms as T
from torchvision.transforms import v2

import smallvit
from smallvit.config.options import AugmentConfig, OptimConfig
from smallvit.datasets.augment import Augment
from smallvit.datasets.presets import PRESETS, preset
from smallvit.plugins.sdpa import set_fused_attention
from smallvit.training.optim import create_optimizer
from smallvit.utils.hardware import autocast, pick_device, pick_dtype

CLASSES = 100
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Batched:
    """Augment a batch with a preset as smallvit does."""

    def __init__(self, aug: str, pixels: Tensor, labels: Tensor) -> None:
        self.augment = Augment.from_config(AugmentConfig(aug=aug), pixels.shape[-1], flip=True)
        self.pixels, self.labels = pixels, labels
        self.mean, self.std = torch.tensor([MEAN, STD], device=pixels.device)[:, :, None, None]
        self.rounds = 0

    def __call__(self) -> None:
        self.rounds += 1
        draws = self.augment.draw(np.random.default_rng(self.rounds), len(self.pixels), *self.pixels.shape[-2:])
        pixels = self.pixels.clone()  # a batch gathered from the data set
        self.augment.apply(pixels, self.labels, draws, self.mean, self.std, CLASSES)


class PerImage:
    """Augment a batch with torchvision's transforms: PIL images one by one, mixing on the batch."""

    def __init__(
        self,
        aug: str,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        classes: int = CLASSES,
    ) -> None:
        values, size = preset(aug, pixels.shape[-1]), pixels.shape[-1]
        steps: list[Any] = [T.RandomHorizontalFlip(values["flip"])]
        if values["crop"] == "pad":
            steps.append(T.RandomCrop(size, padding=values["crop_padding"] or size // 8))
        if values["auto_augment"] == "autoaugment":
            steps.append(T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=128))
        steps += [T.ToTensor(), T.Normalize(mean, std)]
        if values["random_erasing"]:
            steps.append(T.RandomErasing(values["random_erasing"], (0.02, values["erasing_area"])))
        self.transform = T.Compose(steps)
        mixes = [v2.MixUp(alpha=1.0, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
        self.mix = v2.RandomChoice(mixes) if values["mixup_prob"] else None
        self.prob, self.classes, self.device = values["mixup_prob"], classes, pixels.device
        self.images, self.labels = pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.cpu()

    def __call__(self) -> None:
        x, targets = self.mix_batch(
            torch.stack([self.transform(Image.fromarray(image)) for image in self.images]), self.labels
        )
        x.to(self.device), targets.to(self.device)

    def mix_batch(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a mixed batch and its label distributions."""
        if self.mix is not None and torch.rand(()) < self.prob:
            return self.mix(x, labels)
        return x, F.one_hot(labels, self.classes).float()


EXPRESSIBLE = ("none", "basic", "mix", "lee2021")
"""Presets for which torchvision has every operation; it mixes per batch."""


class AllocatedBytes(TorchDispatchMode):
    """Count the bytes of live tensors and their peak while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self.known:
                self._add(key, leaf.untyped_storage())
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self.known.add(key)
        self.current += (size := storage.nbytes())
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.current -= size


def train_step(device: torch.device, batch: int = 128) -> float:
    """Return the seconds of a training step without its input: median of five."""
    dtype = pick_dtype(device, "auto")
    model = smallvit.create_model("vit+spt+lsa", img_size=32, num_classes=CLASSES).to(device)
    set_fused_attention(model, device.type, dtype)
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.05))
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % CLASSES

    def step() -> None:
        with autocast(device, dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return statistics.median([measure_seconds(step, device) for _ in range(7)][2:])


def peak_bytes(call: Batched, device: torch.device) -> int:
    """Return the peak memory of a call."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with AllocatedBytes() as allocated:
        call()
    return allocated.peak


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options_parser(__doc__, batch_size=512, rounds=15)
    parser.add_argument("--aug", nargs="+", default=list(PRESETS), choices=PRESETS)
    options = parser.parse_args(argv)
    device, b, size = pick_device(options.device), options.batch_size, options.img_size
    pixels = smooth_images(b, size).to(device)
    labels = torch.randint(0, CLASSES, (b,), generator=torch.Generator().manual_seed(0)).to(device)

    batched = {("batched", aug): Batched(aug, pixels, labels) for aug in options.aug}
    per_image = {("per image", aug): PerImage(aug, pixels, labels) for aug in options.aug if aug in EXPRESSIBLE}
    times = measure_in_turns(batched | per_image, options.rounds, device)
    step = train_step(device)
    table = Table("--aug", "images/s", "per image", "ratio", "share of a step", "peak MiB")
    for key, call in batched.items():
        aug, seconds = key[1], times[key]
        rate = b / statistics.median(seconds)
        row = [aug, f"{rate:,.0f}", "", "", f"{100 * (128 / rate) / step:.1f} %"]
        if other := times.get(("per image", aug)):
            row[2:4] = f"{b / statistics.median(other):,.0f}", f"{median_ratio(other, seconds):.1f}"
        table.add_row(*row, f"{peak_bytes(call, device) / 2**20:.0f}")
    console = wide_console()
    figures = f"{size} px, batch {b}, medians of {options.rounds}; a step takes {1000 * step:.0f} ms"
    console.print(f"{describe_machine(device)}, {figures}")
    console.print(table)


if __name__ == "__main__":
    main()
