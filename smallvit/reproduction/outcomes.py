"""What records say together: accuracy over seeds, what a model gains over another, speed. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from smallvit.reproduction.experiments import experiment
from smallvit.reproduction.records import Record, of
from smallvit.reproduction.trials import Trial

PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "RTX 4090": 165.2}
"""Matrix products in bfloat16, dense, in TFLOP/s by a part of the device's name, as NVIDIA's data sheets have them."""
FLOPS_A_MAC = 6
"""Of a training step for each multiply-accumulate of the forward pass: two there, four in the backward pass."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of the sample (n - 1); nothing for a single one."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of values, one at least."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __format__(self, form: str) -> str:
        """Mean ± deviation, both in a number's format."""
        return format(self.mean, form) + ("" if self.deviation is None else f" ± {self.deviation:{form.lstrip('+')}}")


@dataclass(frozen=True, eq=False)
class Outcome:
    """A trial, and its records."""

    trial: Trial
    runs: tuple[Record, ...]
    rivals: tuple[Record, ...]
    """Those of the trial that it is to improve on."""

    @property
    def top1(self) -> Spread | None:
        """Test accuracy in per cent."""
        return self._spread(lambda run: run.top1)

    @property
    def val_top1(self) -> Spread | None:
        """Accuracy on validation images, by which the epoch was chosen; nothing where there were none."""
        known = all(run.summary["val_top1"] is not None for run in self.runs)
        return self._spread(lambda run: run.summary["val_top1"]) if known else None

    @property
    def gain(self) -> Spread | None:
        """Points of accuracy over the rival, seed by seed."""
        rivals = {run.seed: run.top1 for run in self.rivals}
        gains = [run.top1 - rivals[run.seed] for run in self.runs if run.seed in rivals]
        return Spread.of(gains) if gains else None

    @property
    def seconds(self) -> Spread | None:
        """Of training, on the first run's machine."""
        return self._spread(lambda run: run.summary["train_seconds"], self.on_one_machine)

    @property
    def rate(self) -> Spread | None:
        """Training images per second, on the first run's machine."""
        return self._spread(lambda run: run.summary["images_per_second"], self.on_one_machine)

    @property
    def temperature(self) -> Spread | None:
        """What LSA's learnt temperatures are in the end, their mean over layers and heads; nothing without them."""
        learnt = all(run.epochs.get("temperature") for run in self.runs)
        return self._spread(lambda run: run.epochs["temperature"][-1]) if learnt else None

    @property
    def teraflops(self) -> float | None:
        """10¹² operations per second while training, those of the model's matrix products alone."""
        return None if self.rate is None else FLOPS_A_MAC * self.first("macs") * self.rate.mean / 1e12

    @property
    def share_of_peak(self) -> float | None:
        """Of the device's fastest, where that is known; nothing for a part of a device."""
        hardware = self.first("hardware") or ""
        peak = None if "MIG" in hardware else next((PEAKS[name] for name in PEAKS if name in hardware), None)
        bf16 = self.first("precision") == "bf16"
        return self.teraflops / peak if peak and bf16 and self.teraflops else None

    @property
    def overtaking(self) -> float | None:
        """Share of its images after which its validation accuracy is what the rival's is at the end.

        Means are over the seeds that both have.
        """
        mine = curve([run for run in self.runs if run.seed in {other.seed for other in self.rivals}])
        theirs = curve([run for run in self.rivals if run.seed in {other.seed for other in self.runs}])
        if not mine or not theirs:
            return None
        return next((number / len(mine) for number, top1 in enumerate(mine, 1) if top1 >= theirs[-1]), None)

    def first(self, name: str) -> Any:
        """A figure of the first run's summary."""
        return self.runs[0].summary.get(name) if self.runs else None

    @property
    def on_one_machine(self) -> list[Record]:
        """The runs on the hardware of the first, as speeds of several have no mean."""
        return [run for run in self.runs if run.summary["hardware"] == self.first("hardware")]

    def _spread(self, value: Callable[[Record], float], runs: Sequence[Record] | None = None) -> Spread | None:
        values = [value(run) for run in (self.runs if runs is None else runs)]
        return Spread.of(values) if values else None


def curve(runs: Sequence[Record]) -> list[float]:
    """Mean validation accuracy after each epoch; nothing where it was not measured."""
    columns = [run.epochs["val_top1"] for run in runs]
    if not columns or any(None in column for column in columns):
        return []
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def outcomes(name: str, budget: float, records: Iterable[Record]) -> list[Outcome]:
    """One for each trial of an experiment, whether it has records or not."""
    found = of(records, name, budget)
    return [
        Outcome(trial, tuple(found.get(trial.label, ())), tuple(found.get(trial.against, ())))
        for trial in experiment(name).trials
    ]


def published_gain(name: str, trial: Trial) -> float | None:
    """Points of accuracy over the rival that others got."""
    rival = next((other for other in experiment(name).trials if other.label == trial.against), None)
    if rival is None or None in (trial.published, rival.published):
        return None
    return trial.published - rival.published
