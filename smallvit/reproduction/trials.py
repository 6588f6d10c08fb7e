"""What an experiment is: trials of models on the same images, at a budget. Needs no torch.

A budget below 1 shows each model that share of the images that the whole experiment shows it: in fewer epochs, down to
ten; below that, of a part of each class's training images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from smallvit.comparison import rows
from smallvit.config import Config
from smallvit.datasets.table import DATASETS
from smallvit.errors import InputError, nearest
from smallvit.inherit import inherited
from smallvit.options import DataConfig
from smallvit.regularise import regularised

LEAST_EPOCHS = 10
"""A smaller budget than so many epochs takes fewer images instead."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model of an experiment."""

    label: str
    """What it is called, and what --rows takes."""
    row: str
    """Model and training, in the form of `smallvit compare --arch`."""
    published: float | None = None
    """Test accuracy in per cent that others got."""
    source: str | None = None
    """Who."""
    teacher: str | None = None
    """Label of the trial whose model of the same seed teaches this one."""
    against: str | None = None
    """Label of the trial that this one is to improve on."""

    @property
    def text(self) -> str:
        """Its row, with its teacher by label: without one there is no distillation."""
        return f"{self.row},teacher={self.teacher}" if self.teacher else self.row

    def parsed(self) -> rows.Row:
        """What its row says."""
        return rows.parse(self.text)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Models trained on the same images, for as many of them."""

    title: str
    data: str
    """Data set by name."""
    epochs: int
    """Passes over the images."""
    seeds: int
    """Runs of each model."""
    trials: tuple[Trial, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    """Options of all models."""

    def options(self, budget: float) -> dict[str, Any]:
        """Options of all models at this budget: what `Config.build` takes."""
        return self.flags | {"data": self.data} | self.length(budget)

    def length(self, budget: float) -> dict[str, Any]:
        """Epochs and share of the images, of which the product is the budget's share of the whole."""
        epochs = max(min(LEAST_EPOCHS, self.epochs), round(self.epochs * budget))
        whole = self.flags.get("train_fraction", 1.0)
        part = whole if round(self.epochs * budget) >= epochs else round(whole * self.epochs * budget / epochs, 6)
        return {"epochs": epochs} | ({"train_fraction": part} if part < 1 else {})

    def counted(self, budget: float) -> float:
        """The budget as it counts: the whole where nothing is spared.

        Raises:
            InputError: it leaves less than one image of each class to learn from.
        """
        if (left := self.images_of_a_class(budget)) < 1:
            raise InputError(
                f"--budget {budget:g}: leaves {left:.2g} training images of each class, expected one at least; give a "
                "larger share"
            )
        return 1.0 if self.length(budget) == self.length(1.0) else budget

    def images_of_a_class(self, budget: float) -> float:
        """How many there are to learn from, about: classes differ."""
        entry, options = DATASETS[self.data], self.options(budget)
        held_out = (options.get("val_fraction", DataConfig.val_fraction), 0 if entry.test else DataConfig.test_fraction)
        learnt = entry.train * options.get("train_fraction", 1.0) / entry.classes
        return learnt * (1 - held_out[0]) * (1 - held_out[1])

    def chosen(self, labels: list[str]) -> tuple[Trial, ...]:
        """The trials of these labels, all where there are none, and those that teach them.

        Raises:
            InputError: there is no such trial; the line names the nearest.
        """
        known = {trial.label: trial for trial in self.trials}
        for label in labels:
            if label not in known:
                raise InputError(f"--rows {label}: expected one of {'; '.join(known)}{nearest(label, known)}")
        wanted = {*labels} | {known[label].teacher for label in labels} if labels else {*known}
        return tuple(trial for trial in self.trials if trial.label in wanted)


def required(experiment: Experiment, trial: Trial, budget: float) -> dict[str, Any]:
    """Every option of a trial's runs at this budget, but for those of the machine, the seed and the teacher's place.

    Raises:
        InputError: there is no such budget.
    """
    return _complete(trial.text, tuple(sorted(experiment.options(budget).items())))


@functools.cache
def _complete(row: str, flags: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    parsed = rows.parse(row)
    return regularised(inherited(Config.build(**parsed.given(dict(flags), parsed.recipe)))).options()
