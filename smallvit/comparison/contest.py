"""The runs of a comparison: one for each row and seed, in a folder of its own, checked before any is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from smallvit import datasets, models
from smallvit.comparison import apart
from smallvit.comparison.rows import Row, spelt
from smallvit.compiling import is_convolutional
from smallvit.config import Config
from smallvit.datasets.images import ImageDataset
from smallvit.errors import InputError
from smallvit.inherit import inherited
from smallvit.opening import MAY_DIFFER
from smallvit.options import OptimConfig, flag
from smallvit.regularise import regularised
from smallvit.runs import Run
from smallvit.setup import prepare
from smallvit.watching import View, read

CNN_RECIPE = "cnn"
"""For convolutional models, where no other is named."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is to be trained and compared."""

    rows: Sequence[Row]
    flags: dict[str, Any]
    """Options of all rows."""
    seeds: range
    out: Path
    recipe: str | None = None
    """Of all rows that name none."""
    images_seen: int | None = None
    """The budget, where it is given in images."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a contest."""

    row: Row
    seed: int
    folder: Path
    recipe: str | None
    options: dict[str, Any]
    """What `Config.build` takes."""

    @property
    def is_finished(self) -> bool:
        """Whether the run is there.

        Raises:
            InputError: another one is, or a damaged one.
        """
        if not (self.folder / Run.CONFIG).exists():
            return False
        view = self._view()
        asked, there = (regularised(inherited(c)).options() for c in (Config.build(**self.options), view.config))
        for name, value in asked.items():
            open_still = name == "streaming" and value == "auto"
            if name not in MAY_DIFFER and value != there[name] and not open_still:
                raise InputError(
                    f"{self.folder}: holds a run with {flag(name)} {spelt(there[name])}, not {spelt(value)}; "
                    "choose another --out, or remove it"
                )
        return view.summary is not None

    def _view(self) -> View:
        """What the folder tells.

        Raises:
            InputError: it is damaged.
        """
        try:
            return read(self.folder)
        except InputError as error:
            raise InputError(f"{str(error).partition(';')[0]}; remove {self.folder}, and it is trained anew") from None

    def train(self, head: str, console: Console) -> bool:
        """Train it, unless it is finished; returns whether it is in the end. `head` begins what is said of it.

        Raises:
            Interrupted: a signal ended it; the run is saved.
        """
        what = f"{head} {self.row.label}, seed {self.seed}:"
        if self.is_finished:
            console.print(f"{what} there already, {self.folder}")
            return True
        console.print(f"\n{what} {'goes on in ' if (self.folder / Run.STATE).exists() else ''}{self.folder}")
        code = apart.train(self.options, self.folder)
        if code:
            console.print(f"{what} failed (exit code {code}); the others go on")
        return code == 0

    def check(self) -> None:
        """Put together what it trains with, and let go of it again.

        Raises:
            InputError: something is not there, or does not fit.
        """
        with self.row.named():
            prepare(inherited(Config.build(**self.options)), begins=not (self.folder / Run.STATE).exists())
        torch.cuda.empty_cache()


def entries(contest: Contest) -> list[Entry]:
    """Its runs: every row's first seed, then every row's second, ...

    Raises:
        InputError: unusable data, a row that is there twice or does not fit, or rows of different lengths.
    """
    labels = [row.label for row in contest.rows]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"row {twice[0]} is there twice")
    dataset = datasets.load(Config.build(**contest.flags).data)
    flags = contest.flags | {"data": dataset.source}
    recipes, given = [], []
    for row in contest.rows:
        with row.named():
            recipes.append(_recipe(contest, row, dataset))
            size = {"img_size": dataset.img_size} if row.options.get("init") else {}  # not that of the weights
            given.append(row.given(flags | size, recipes[-1]))
            Config.build(**given[-1])
    epochs = _epochs(contest, given, len(dataset.train))
    return [
        Entry(
            row=row,
            seed=seed,
            folder=contest.out / row.folder(seed),
            recipe=recipe,
            options=options | {"epochs": epochs, "seed": seed},
        )
        for seed in contest.seeds
        for row, recipe, options in zip(contest.rows, recipes, given, strict=True)
    ]


def _recipe(contest: Contest, row: Row, dataset: ImageDataset) -> str | None:
    if (named := row.recipe or contest.recipe) is not None:
        return named
    with torch.device("meta"):
        sizes = {"img_size": dataset.img_size, "in_chans": dataset.in_chans, "num_classes": len(dataset.class_names)}
        model = models.create_model(row.arch, **sizes)
    return CNN_RECIPE if is_convolutional(model) else None


def _epochs(contest: Contest, given: Sequence[dict[str, Any]], images: int) -> int:
    """The one length of all runs."""
    if contest.images_seen is not None:
        return math.ceil(contest.images_seen / images)
    lengths = [options.get("epochs", OptimConfig.epochs) for options in given]
    if len(set(lengths)) > 1:
        told = ", ".join(f"{row.label} {epochs}" for row, epochs in zip(contest.rows, lengths, strict=True))
        raise InputError(f"the rows' recipes differ in their epochs ({told}); give --epochs or --images-seen for all")
    return lengths[0]
