"""What comes out of a run: its summary, and how a person is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from smallvit import checkpoint, hardware
from smallvit.costs.bits import float_bytes, packed_bytes
from smallvit.runs import Run
from smallvit.setup import Setup
from smallvit.state import RunState


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and what `summary.json` there says."""

    folder: Path
    summary: dict[str, Any]

    def load(self, weights: str = "best") -> nn.Module:
        """The trained model, in evaluation mode."""
        return checkpoint.load(self.folder, weights)


def summarise(setup: Setup, state: RunState, chosen: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    """The contents of summary.json; accuracies in per cent."""
    seen = state.epoch * setup.batches.sampling.views
    return {
        "test_top1": test["top1"],
        "test_loss": test["loss"],
        "test_images": test["images"],
        "val_top1": chosen["val_top1"],
        "best_epoch": chosen["epoch"],
        "epochs": state.epoch,
        "train_seconds": state.seconds,
        "images_seen": seen,
        "images_per_second": seen / state.step_seconds,
        "parameters": setup.parameters,
        "macs": setup.operations.macs,
        "bops": setup.operations.bops,
        "ops": setup.operations.ops,
        "packed_bytes": packed_bytes(setup.model),
        "float_bytes": float_bytes(setup.model),
        "peak_memory_bytes": hardware.peak_memory_bytes(setup.device),
        "device": str(setup.device),
        "processes": setup.world.size,
        "compile": setup.config.compute.compile,
        "hardware": hardware.describe_hardware(setup.device),
        "precision": setup.precision,
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


def show(result: Result, console: Console) -> Result:
    """Print the outcome and where everything lies."""
    summary, folder = result.summary, result.folder
    top1, epochs = summary["val_top1"], summary["epochs"]
    chosen = f"last of {epochs} epochs"
    if top1 is not None:
        chosen = f"validation {top1:.2f} %, best epoch {summary['best_epoch']} of {epochs}"
    console.print(
        f"\ntest top-1 {summary['test_top1']:.2f} %  ({chosen}, "
        f"trained in {summary['train_seconds']:.0f} s, {summary['images_per_second']:,.0f} images/s)"
    )
    for what, name in (("weights", Run.BEST), ("curves", Run.CURVES), ("summary", Run.SUMMARY)):
        console.print(f"{what:8} {folder / name}")
    return result
