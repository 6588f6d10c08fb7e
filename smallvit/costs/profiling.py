"""What models cost, side by side: parameters, operations, memory and time, at several image sizes.

Everything is built once before anything is measured, so that a row that cannot be is known at once. Models take turns
in what is timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from smallvit import hardware
from smallvit.costs import memory
from smallvit.costs.memory import unless_short
from smallvit.costs.subjects import Case, Subject
from smallvit.errors import InputError
from smallvit.precision import sound_dtype
from smallvit.ready import settled
from smallvit.speed import ROUNDS, Timed, spread

IMG_SIZE = 32
"""Of rows that no run is behind."""
SIZES = (32, 48, 64, 96, 128, 160, 224)
"""Over which models grow, those that each of them takes."""
GROWTH_ROUNDS = 5
LEAST_STEP = 2
"""Images of a training step; a single one is too few for batch norms of maps of one place."""
COUNTED = ("tokens", "parameters", "macs", "bops", "flops", "ops", "packed_bytes", "float_bytes")
ATTENTION = ("attention_macs", "attention_macs_formula")
SHORT = ("activation_bytes_per_image", "step_peak_bytes")
"""Figures beside the times that memory may be short for."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and on what."""

    subjects: Sequence[Subject]
    img_sizes: Sequence[int] = ()
    """In pixels; by default a run's own, and 32."""
    batch_sizes: Sequence[int] = (1, 16, 128)
    """Of inference; the first is growth's, the largest the training step's."""
    growth: Sequence[int] | None = None
    """Image sizes over which models grow, with the patches that suit the smallest; none: `SIZES`; None: no growth."""
    device: str = "auto"
    amp: Literal["auto", "bf16", "off"] = "auto"

    @property
    def step_batch(self) -> int:
        """Images of the training step whose memory is measured."""
        return max(LEAST_STEP, *self.batch_sizes)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The machine that models are measured on."""

    device: torch.device
    dtype: torch.dtype

    def place(self, case: Case) -> nn.Module:
        """A case's model where it is measured."""
        return settled(case.build(), self.device, self.dtype)

    def images(self, case: Case, count: int) -> torch.Tensor:
        """Noise (count, c, h, w)."""
        shape = (count, case.in_chans, case.img_size, case.img_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def activations(self, model: nn.Module, case: Case) -> int | None:
        """Bytes that an image adds to what is kept for the backward pass; None where memory is short."""
        place = case.in_chans, case.img_size, self.device, self.dtype
        return unless_short(self.device, lambda: memory.activation_bytes(model, *place))

    def timed(self, model: nn.Module, case: Case, batch: int, *, alone: bool) -> Timed | None:
        """A model that answers batches of so many images; None where memory is short."""
        return unless_short(self.device, lambda: Timed(model, self.images(case, batch), self.dtype, alone=alone))


def measure(plan: Plan) -> dict[str, Any]:
    """Measure what is planned: records of rows and of their growth, and all that decides them.

    Raises:
        InputError: no such device, or a row that takes none of the images; nothing has been measured then.
    """
    device = hardware.pick_device(plan.device)
    wanted = [(each, size) for each in plan.subjects for size in plan.img_sizes or [each.own_size or IMG_SIZE]]
    cases = [each.at(size) for each, size in _watched(wanted, "putting models together")]
    grown = []
    if plan.growth is not None:
        grown = [_growing(each, plan.growth) for each in _watched(plan.subjects, "counting")]
    bench = Bench(device=device, dtype=_common_dtype(cases, device, plan.amp))
    found = {"rows": _rows(cases, plan, bench)}
    if plan.growth is not None:
        found["growth"] = _growth(list(chain.from_iterable(grown)), plan.batch_sizes[0], bench)
    return found | {
        "batch_sizes": list(plan.batch_sizes),
        "step_batch_size": plan.step_batch,
        "rounds": ROUNDS,
        "device": device.type,
        "hardware": hardware.describe_hardware(device),
        "precision": "bf16" if bench.dtype == torch.bfloat16 else "fp32",
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


def _common_dtype(cases: Sequence[Case], device: torch.device, amp: Literal["auto", "bf16", "off"]) -> torch.dtype:
    """The precision that is sound for all; fp32 where they differ."""
    sound = {sound_dtype(device, amp, case.build(), case.in_chans, case.img_size) for case in cases}
    return sound.pop() if len(sound) == 1 else torch.float32


def _growing(subject: Subject, sizes: Sequence[int]) -> list[Case]:
    """A row at the sizes that it takes, as made for the smallest; sizes that were asked for it must take.

    Raises:
        InputError: it does not.
    """
    cases: list[Case] = []
    for size in sorted(sizes or SIZES):
        try:
            cases.append(subject.at(size, cases[0].spec if cases else None))
        except InputError as error:
            if sizes:
                raise
            refusal = error
    if not cases:
        raise refusal
    return cases


def _rows(cases: Sequence[Case], plan: Plan, bench: Bench) -> list[dict[str, Any]]:
    """A record for each case: memory one after the other, then time in turns."""
    models, records = [], []
    for case in _watched(cases, "memory"):
        models.append(bench.place(case))
        records.append(_opened(case, COUNTED) | _memory(models[-1], case, plan, bench))
    forms = {"latency_ms": (1, True), **{f"images_per_second_{n}": (n, False) for n in plan.batch_sizes}}
    table = [
        {name: bench.timed(model, case, n, alone=alone) for name, (n, alone) in forms.items()}
        for model, case in _watched(list(zip(models, cases, strict=True)), "warming up")
    ]
    _take_turns(table, _watched(range(ROUNDS), "time"))
    return [_finished(record, row) for record, row in zip(records, table, strict=True)]


def _memory(model: nn.Module, case: Case, plan: Plan, bench: Bench) -> dict[str, int | None]:
    def step() -> int:
        return memory.step_peak_bytes(model, bench.images(case, plan.step_batch), bench.dtype)

    kept = {"activation_bytes_per_image": bench.activations(model, case)}
    if bench.device.type not in memory.COUNTABLE:
        return kept
    return kept | {"step_batch_size": plan.step_batch, "step_peak_bytes": unless_short(bench.device, step)}


def _growth(cases: Sequence[Case], batch: int, bench: Bench) -> list[dict[str, Any]]:
    """A record for each case, those of the same size measured in turns."""
    records = []
    for size in _watched(sorted({case.img_size for case in cases}), "growing"):
        here = [(case, bench.place(case)) for case in cases if case.img_size == size]
        kept = [{"activation_bytes_per_image": bench.activations(model, case)} for case, model in here]
        table = [{"ms_per_image": bench.timed(model, case, batch, alone=True)} for case, model in here]
        _take_turns(table, range(GROWTH_ROUNDS))
        for (case, _), bytes_, row in zip(here, kept, table, strict=True):
            records.append(_finished(_opened(case, COUNTED + ATTENTION) | bytes_ | {"batch_size": batch}, row))
    labels = list(dict.fromkeys(case.label for case in cases))
    return sorted(records, key=lambda record: labels.index(record["model"]))


def _take_turns(table: Sequence[dict[str, Timed | None]], rounds: Iterable[int]) -> None:
    """Sample the rows of a table round by round, column by column."""
    for _ in rounds:
        for name in table[0]:
            for row in table:
                if row[name] is not None:
                    row[name].round()


def _opened(case: Case, counted: Sequence[str]) -> dict[str, Any]:
    """A record with what is known beforehand."""
    named = {"model": case.label, "img_size": case.img_size, "patch_size": case.spec["patch_size"]}
    return named | {name: case.counts[name] for name in counted}


def _finished(record: dict[str, Any], row: dict[str, Timed | None]) -> dict[str, Any]:
    """A record with its times, medians and the range of the middle half, and what memory was short for."""
    for name, timed in row.items():
        if timed is None:
            record |= {name: None, f"{name}_iqr": None}
        else:
            record |= spread(name, timed.rates if name.startswith("images") else timed.milliseconds)
    short = [name for name in (*SHORT, *row) if name in record and record[name] is None]
    return record | {"out_of_memory": " ".join(short) or None}


def _watched(items: Sequence[T], what: str) -> Iterable[T]:
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
