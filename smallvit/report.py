"""Run folders to pictures. Reads plain records, imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from smallvit.files import replacing


def plot_curves(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, accuracy and learning rate over the epochs, as a PNG."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in history]
    style = {"marker": "o", "markersize": 3} if len(epochs) < 30 else {}
    loss.plot(epochs, [line["train_loss"] for line in history], label="training (augmented)", **style)
    validated = [line for line in history if line["val_top1"] is not None]
    tested = [line["epoch"] for line in validated]
    loss.plot(tested, [line["val_loss"] for line in validated], label="validation", **style)
    loss.set(ylabel="cross-entropy")
    loss.legend()
    accuracy.plot(tested, [line["val_top1"] for line in validated], color="C1", label="validation", **style)
    if validated:
        best = max(validated, key=lambda line: line["val_top1"])
        accuracy.plot(best["epoch"], best["val_top1"], "k*", label=f"best: {best['val_top1']:.2f} %")
    accuracy.set(ylabel="top-1 accuracy (%)")
    accuracy.legend(loc="lower right")
    rate.plot(epochs, [line["lr"] for line in history], color="C2", **style)
    rate.set(ylabel="learning rate")
    for axes in (loss, accuracy, rate):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
