"""What SPT and LSA cost a training step in time and memory, for each of the paper's models, side by side.

    python benchmarks/plugins.py [--arch vit] [--compile] [--precision fp32 bf16] [--paths] [--rounds 9]

All variants take turns within each round, so that a busy machine slows them alike; printed are medians over the
rounds, and ratios to the plain model of the same precision, medians of the rounds' ratios. A step is forward,
backward and fused AdamW. Memory is what a step keeps for its backward pass. "embedding only" leaves the merging of
patches (PiT, Swin) as it was: SPT's is five times as wide.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import smallvit
from smallvit.hardware import autocast, describe_hardware, pick_device, pick_dtype
from smallvit.optim import create_optimizer
from smallvit.options import OptimConfig
from smallvit.plugins import attend, set_fused_attention
from smallvit.published import PUBLISHED

BOTH = {"spt": True, "lsa": True}
PLUGINS: dict[str, dict[str, Any]] = {"plain": {}, "+ SPT": {"spt": True}, "+ LSA": {"lsa": True}, "+ SPT + LSA": BOTH}
EMBEDDING_ONLY = "+ SPT + LSA, embedding only"
MERGING = ("transformers.*.pool.conv", "layers.*.downsample")
prefers_fused = attend.prefers_fused


@dataclass(frozen=True)
class Variant:
    """One thing measured."""

    dtype: torch.dtype
    compiled: bool
    name: str
    fused: bool | None = None
    """The attention path; None for the chosen one."""


class Step:
    """One training step of a fresh model."""

    def __init__(self, variant: Variant, arch: str, size: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        model = smallvit.create_model(arch, img_size=size, num_classes=100)
        if variant.name == EMBEDDING_ONLY:
            smallvit.patch(model, **BOTH, exclude=MERGING)
        elif PLUGINS[variant.name]:
            smallvit.patch(model, **PLUGINS[variant.name])
        self.model: nn.Module = model.to(device)
        self.optimizer = create_optimizer(model, OptimConfig(weight_decay=0.05))
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.labels = torch.arange(batch, device=device) % 100
        self.variant, self.device = variant, device
        set_fused_attention(model, device.type, variant.dtype)
        for module in model.modules() if variant.fused is not None and variant.name == "plain" else ():
            if hasattr(module, "fused_attn"):
                module.fused_attn = variant.fused
        self.call = torch.compile(model, fullgraph=True) if variant.compiled else model

    def path(self) -> Any:
        """Attention on the path that the variant says."""
        fused = self.variant.fused
        return _Path(prefers_fused if fused is None else lambda *_: fused)

    def loss(self) -> Tensor:
        """Forward."""
        with self.path(), autocast(self.device, self.variant.dtype):
            return F.cross_entropy(self.call(self.images).float(), self.labels)

    def __call__(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()  # waits for the device

    def kept(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, parameters aside."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss()
        return sum(storages.values())


class _Path:
    """While it is on, attention's choice of path is this one."""

    def __init__(self, choose: Callable[..., bool]) -> None:
        self.choose = choose

    def __enter__(self) -> None:
        attend.prefers_fused = self.choose

    def __exit__(self, *_: object) -> None:
        attend.prefers_fused = prefers_fused


def variants(arch: str, dtypes: list[torch.dtype], compiled: bool, paths: bool) -> list[Variant]:
    """What is measured for an architecture."""
    names = [*PLUGINS, *([EMBEDDING_ONLY] if arch in ("pit", "swin") else [])]
    chosen = [Variant(*form) for form in itertools.product(dtypes, (False, True) if compiled else (False,), names)]
    forms = itertools.product(dtypes, (False,), ("plain", "+ LSA"), (False, True)) if paths else []
    return chosen + [Variant(*form) for form in forms]


def measure(arch: str, chosen: list[Variant], size: int, batch: int, rounds: int, device: torch.device) -> Table:
    """Take turns, and put the medians into a table."""
    steps = {variant: Step(variant, arch, size, batch, device) for variant in chosen}
    kept = {variant: step.kept() for variant, step in steps.items() if not variant.compiled}
    for step in track(steps.values(), f"{arch}: warming up", transient=True):
        for _ in range(2):
            step()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in chosen}
    for _ in track(range(rounds), f"{arch}: measuring", transient=True):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - started)
    table = Table("precision", "mode", arch, "ms a step", "images/s", "x plain", "MiB kept", title=arch)
    for variant, times in seconds.items():
        plain = Variant(variant.dtype, variant.compiled, "plain")
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[plain], strict=True)]
        path = {None: "", True: ", fused kernel", False: ", two products"}[variant.fused]
        table.add_row(
            str(variant.dtype).removeprefix("torch."),
            "compiled" if variant.compiled else "eager",
            variant.name + path,
            f"{1e3 * statistics.median(times):.1f}",
            f"{batch / statistics.median(times):,.0f}",
            f"{statistics.median(ratios):.3f}",
            f"{kept[variant] / 2**20:,.0f}" if variant in kept else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["vit"], choices=PUBLISHED)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="also compiled (some 20 s for each variant)")
    parser.add_argument("--paths", action="store_true", help="also each attention path by itself")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    known = {"fp32": torch.float32, "bf16": pick_dtype(device, "auto")}
    dtypes = list(dict.fromkeys(known[name] for name in arguments.precision))
    console = Console()
    console.width = max(100, console.width)  # also where the output goes to a file
    size, batch, rounds = arguments.img_size, arguments.batch_size, arguments.rounds
    console.print(
        f"{describe_hardware(device)}, torch {torch.__version__}, {size} px, batch {batch}, medians of {rounds}"
    )
    for arch in arguments.arch:
        chosen = variants(arch, dtypes, arguments.compile, arguments.paths)
        console.print(measure(arch, chosen, size, batch, rounds, device))
        torch.compiler.reset()


if __name__ == "__main__":
    main()
