"""Augmentation: images per second of each preset, against torchvision's operations image by image, side by side.

    python benchmarks/input.py [--aug basic paper] [--batch-size 512] [--img-size 32] [--rounds 15]

Both begin with uint8 images in memory and end with a normalised batch and its label distributions on the device; the
per-image form runs in one process, as a worker of a loader would, and is given for the presets that torchvision can
express. They take turns within each round; printed are medians over the rounds, and medians of the rounds' ratios.
The last columns are a batch's share of a ViT's training step (the 32 px model with SPT and LSA, batch 128, in the
precision that `--amp auto` takes) and the most memory that augmenting a batch holds at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms as T
from torchvision.transforms import v2

import smallvit
from smallvit.datasets.augment import Augment
from smallvit.datasets.presets import PRESETS, preset
from smallvit.hardware import autocast, describe_hardware, pick_device, pick_dtype
from smallvit.optim import create_optimizer
from smallvit.options import AugmentConfig, OptimConfig
from smallvit.plugins import set_fused_attention

CLASSES = 100
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Batched:
    """A preset as smallvit applies it."""

    def __init__(self, aug: str, pixels: Tensor, labels: Tensor) -> None:
        self.augment = Augment.from_config(AugmentConfig(aug=aug), pixels.shape[-1], may_flip=True)
        self.pixels, self.labels = pixels, labels
        self.mean, self.std = torch.tensor([MEAN, STD], device=pixels.device)[:, :, None, None]
        self.rounds = 0

    def __call__(self) -> None:
        self.rounds += 1
        draws = self.augment.draw(np.random.default_rng(self.rounds), len(self.pixels), *self.pixels.shape[-2:])
        pixels = self.pixels.clone()  # a batch gathered from the data set
        x, targets = self.augment.apply(pixels, self.labels, draws, self.mean, self.std, CLASSES)
        _wait(x)


class PerImage:
    """The same operations as torchvision has them: on PIL images, one by one; mixing on the batch."""

    def __init__(self, aug: str, pixels: Tensor, labels: Tensor) -> None:
        values, size = preset(aug, pixels.shape[-1]), pixels.shape[-1]
        steps: list[Any] = [T.RandomHorizontalFlip(values["flip"])]
        if values["crop"] == "pad":
            steps.append(T.RandomCrop(size, padding=values["crop_padding"] or size // 8))
        if values["policy"] == "autoaugment":
            steps.append(T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=(128, 128, 128)))
        steps += [T.ToTensor(), T.Normalize(MEAN, STD)]
        if values["erasing"]:
            steps.append(T.RandomErasing(values["erasing"], (0.02, values["erasing_area"])))
        self.transform = T.Compose(steps)
        mixes = [v2.MixUp(alpha=1.0, num_classes=CLASSES), v2.CutMix(alpha=1.0, num_classes=CLASSES)]
        self.mix = v2.RandomChoice(mixes) if values["mix_prob"] else None
        self.prob, self.device = values["mix_prob"], pixels.device
        self.images, self.labels = pixels.permute(0, 2, 3, 1).cpu().numpy(), labels.cpu()

    def __call__(self) -> None:
        x = torch.stack([self.transform(Image.fromarray(image)) for image in self.images])
        if self.mix is not None and torch.rand(()) < self.prob:
            x, targets = self.mix(x, self.labels)
        else:
            targets = F.one_hot(self.labels, CLASSES).float()
        targets.to(self.device)
        _wait(x.to(self.device))


EXPRESSIBLE = ("none", "basic", "mix", "paper")
"""Presets for which torchvision has every operation (mixing of `mix` is per batch there)."""


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive while it is on, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self.known:
                self._add(key, leaf.untyped_storage())
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self.known.add(key)
        self.now += (size := storage.nbytes())
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def train_step(device: torch.device, batch: int = 128) -> float:
    """Seconds of a training step, the input aside: median of five."""
    dtype = pick_dtype(device, "auto")
    model = smallvit.create_model("vit", img_size=32, num_classes=CLASSES, spt=True, lsa=True).to(device)
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

    return statistics.median([seconds(step) for _ in range(7)][2:])


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Batched, device: torch.device) -> int:
    """The most that a call holds at once."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    held = Held()
    with held:
        call()
    return held.most


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aug", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, b, size = pick_device(options.device), options.batch_size, options.img_size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(b, 3, size // 4 + 1, size // 4 + 1, generator=generator)  # smooth, as photographs are
    pixels = (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).byte().to(device)
    labels = torch.randint(0, CLASSES, (b,), generator=generator).to(device)

    ours = {aug: Batched(aug, pixels, labels) for aug in options.aug}
    theirs = {aug: PerImage(aug, pixels, labels) for aug in options.aug if aug in EXPRESSIBLE}
    times: dict[tuple[str, str], list[float]] = {}
    for number in track(range(options.rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for form, calls in (("batched", ours), ("per image", theirs)):
            for aug, call in calls.items():
                taken = seconds(call)
                if number:  # the first warms up
                    times.setdefault((form, aug), []).append(taken)
    step = train_step(device)
    table = Table("--aug", "images/s", "per image", "ratio", "share of a step", "MiB at once")
    for aug in ours:
        batched = times["batched", aug]
        rate = b / statistics.median(batched)
        row = [aug, f"{rate:,.0f}", "", "", f"{100 * (128 / rate) / step:.1f} %"]
        if aug in theirs:
            single = times["per image", aug]
            row[2] = f"{b / statistics.median(single):,.0f}"
            row[3] = f"{statistics.median(s / t for s, t in zip(single, batched, strict=True)):.1f}"
        table.add_row(*row, f"{peak_bytes(ours[aug], device) / 2**20:.0f}")
    console = Console()
    console.print(
        f"{describe_hardware(device)}, torch {torch.__version__}, {size} px, batch {b}, medians of {options.rounds}; "
        f"a step takes {1000 * step:.0f} ms"
    )
    console.print(table)


if __name__ == "__main__":
    main()
