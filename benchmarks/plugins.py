"""What SPT and LSA cost a ViT's training step, and what the choice of attention path gains, side by side.

    python benchmarks/plugins.py [--img-size 32] [--batch-size 128] [--rounds 9]

All variants take turns within each round, so that a busy machine slows them alike; printed are medians over the
rounds and ratios to the plain ViT of the same precision. A step is forward, backward and fused AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from smallvit import create_model
from smallvit.config import OptimConfig
from smallvit.hardware import autocast, describe_hardware, pick_device, pick_dtype
from smallvit.optim import create_optimizer
from smallvit.plugins import attend, set_fused_attention

PLUGINS = {"ViT": {}, "+ SPT": {"spt": True}, "+ LSA": {"lsa": True}, "+ SPT + LSA": {"spt": True, "lsa": True}}


def training_step(
    plugins: dict[str, bool], dtype: torch.dtype, fused: bool, size: int, batch: int, device: torch.device
) -> Callable[[], None]:
    """One step of a fresh model, on the attention path that `fused` says."""
    torch.manual_seed(0)
    model = create_model("vit", img_size=size, num_classes=100, **plugins).to(device)
    optimizer = create_optimizer(model, OptimConfig())
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device) % 100

    def step() -> None:
        attend.prefers_fused = lambda *_: fused
        set_fused_attention(model, device.type, dtype)
        with autocast(device, dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    prefers = attend.prefers_fused
    dtypes = dict.fromkeys([torch.float32, pick_dtype(device, "auto")])
    variants = {
        (dtype, name, fused): training_step(plugins, dtype, fused, arguments.img_size, arguments.batch_size, device)
        for dtype, (name, plugins), fused in itertools.product(dtypes, PLUGINS.items(), (True, False))
    }
    seconds: dict[tuple, list[float]] = {variant: [] for variant in variants}
    for round_number in track(range(arguments.rounds + 1), "measuring", transient=True):
        for variant, step in variants.items():
            started = time.perf_counter()
            step()
            if round_number:  # the first warms up
                seconds[variant].append(time.perf_counter() - started)

    table = Table("precision", "model", "attention", "ms a step", "images/s", "x plain, chosen path")
    for dtype in dtypes:
        chosen = prefers(device.type, dtype)
        plain = statistics.median(seconds[dtype, "ViT", chosen])
        for (_, name, fused), times in ((v, t) for v, t in seconds.items() if v[0] == dtype):
            median = statistics.median(times)
            path = ("fused kernel" if fused else "two products") + (" (chosen)" if fused == chosen else "")
            table.add_row(
                str(dtype).removeprefix("torch."),
                name,
                path,
                f"{1e3 * median:.1f}",
                f"{arguments.batch_size / median:,.0f}",
                f"{median / plain:.3f}",
            )
    console = Console()
    console.print(
        f"{describe_hardware(device)}, torch {torch.__version__}, {arguments.img_size} px, "
        f"batch {arguments.batch_size}, median of {arguments.rounds}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
