"""Measure the time and memory that plugins add to a training step.

    python benchmarks/plugins.py [--arch vit] [--more] [--compile] [--precision fp32 bf16] [--paths] [--rounds 9]

All variants take turns within each round. The table has medians over the rounds, and medians of the rounds' ratios to
the model without plugins in the same precision. A step is forward, backward and fused AdamW. Memory is what the forward
pass stores for the backward pass. "embedding only" does not change the patch merging of PiT and Swin, which SPT makes
five times as wide.
"""

from __future__ import annotations

import itertools
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import describe_machine, measure_in_turns, median_ratio, options_parser, wide_console
from rich.table import Table
from torch import nn

import smallvit
from smallvit.config.options import OptimConfig
from smallvit.models.architectures import LEE2021
from smallvit.plugins import sdpa
from smallvit.plugins.sdpa import set_fused_attention
from smallvit.profiling.benchmark import kept_bytes
from smallvit.training.optim import create_optimizer
from smallvit.utils.hardware import autocast, pick_device, pick_dtype

BOTH = {"spt": True, "lsa": True}
PLUGINS: dict[str, dict[str, Any]] = {"plain": {}, "+ SPT": {"spt": True}, "+ LSA": {"lsa": True}, "+ SPT + LSA": BOTH}
MORE: dict[str, dict[str, Any]] = {
    "+ stem": {"stem": True},
    "+ FFN": {"ffn": True},
    "+ XSA": {"xsa": True},
    "+ stem + LSA": {"stem": True, "lsa": True},
    "+ stem + LSA + FFN": {"stem": True, "lsa": True, "ffn": True},
}
EMBEDDING_ONLY = "+ SPT + LSA, embedding only"
MERGING = ("transformers.*.pool.conv", "layers.*.downsample")


@dataclass(frozen=True)
class Variant:
    """A model with plugins in a precision, eager or compiled."""

    dtype: torch.dtype
    compiled: bool
    name: str
    fused: bool | None = None
    """Whether to use the fused attention kernel; None for the default choice."""


class Step:
    """A training step of a new model."""

    def __init__(self, variant: Variant, arch: str, size: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        model = smallvit.create_model(arch, img_size=size, num_classes=100)
        if variant.name == EMBEDDING_ONLY:
            smallvit.patch(model, **BOTH, exclude=MERGING)
        elif plugins := (PLUGINS | MORE)[variant.name]:
            smallvit.patch(model, **plugins)
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

    def attention_path(self) -> AbstractContextManager[Any]:
        """Return a context in which attention uses the variant's path."""
        fused = self.variant.fused
        return nullcontext() if fused is None else mock.patch.object(sdpa, "prefers_fused", return_value=fused)

    def __call__(self) -> None:
        with self.attention_path(), autocast(self.device, self.variant.dtype):
            loss = F.cross_entropy(self.call(self.images).float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def stored_bytes(self) -> int:
        """Return the bytes that the forward pass stores for the backward pass."""
        with self.attention_path():
            return kept_bytes(self.model, self.images, self.variant.dtype)


def variants(arch: str, dtypes: list[torch.dtype], compiled: bool, paths: bool, more: bool) -> list[Variant]:
    """Return the variants to measure for an architecture."""
    names = [*PLUGINS, *(MORE if more else ()), *([EMBEDDING_ONLY] if arch in ("pit", "swin") else [])]
    chosen = [Variant(*form) for form in itertools.product(dtypes, (False, True) if compiled else (False,), names)]
    forms = itertools.product(dtypes, (False,), ("plain", "+ LSA"), (False, True)) if paths else []
    return chosen + [Variant(*form) for form in forms]


def measure(arch: str, chosen: list[Variant], size: int, batch: int, rounds: int, device: torch.device) -> Table:
    """Measure the variants in turns and return the table of medians."""
    steps = {variant: Step(variant, arch, size, batch, device) for variant in chosen}
    stored = {variant: step.stored_bytes() for variant, step in steps.items() if not variant.compiled}
    times = measure_in_turns(steps, rounds, device, warm_up=2, title=arch)
    table = Table("precision", "mode", arch, "ms per step", "images/s", "x plain", "MiB stored", title=arch)
    for variant, seconds in times.items():
        path = {None: "", True: ", fused kernel", False: ", two products"}[variant.fused]
        table.add_row(
            str(variant.dtype).removeprefix("torch."),
            "compiled" if variant.compiled else "eager",
            variant.name + path,
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{batch / statistics.median(seconds):,.0f}",
            f"{median_ratio(seconds, times[Variant(variant.dtype, variant.compiled, 'plain')]):.3f}",
            f"{stored[variant] / 2**20:,.0f}" if variant in stored else "",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options_parser(__doc__, rounds=9)
    parser.add_argument("--arch", nargs="+", default=["vit"], choices=(*LEE2021, "vit96"))
    parser.add_argument("--more", action="store_true", help="also stem, FFN and XSA, which not all models take")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="also compiled (about 20 s per variant)")
    parser.add_argument("--paths", action="store_true", help="also each attention path")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    by_name = {"fp32": torch.float32, "bf16": pick_dtype(device, "auto")}
    dtypes = list(dict.fromkeys(by_name[name] for name in options.precision))
    console, size, batch, rounds = wide_console(100), options.img_size, options.batch_size, options.rounds
    console.print(f"{describe_machine(device)}, {size} px, batch {batch}, medians of {rounds}")
    for arch in options.arch:
        chosen = variants(arch, dtypes, options.compile, options.paths, options.more)
        console.print(measure(arch, chosen, size, batch, rounds, device))
        torch.compiler.reset()


if __name__ == "__main__":
    main()
