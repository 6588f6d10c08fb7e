"""Stand-ins for the processes of torchrun, for tests in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from smallvit.utils.distributed import World


@dataclass(frozen=True)
class LoneWorld(World):
    """One of `size` processes without the others: they agree with it, and the first one has sent `sent` before."""

    sent: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Names of the calls that all processes must make in the same order."""

    def agree_all(self, *values: int) -> tuple[int, ...]:
        self.calls.append("agree")
        return values

    def total(self, values: Tensor) -> Tensor:
        self.calls.append("total")
        return values.clone()

    def gather(self, value: Any) -> list[Any]:
        self.calls.append("gather")
        return [value]

    def create_patient_group(self) -> None:
        self.calls.append("group")

    def wait(self, group: object) -> None:
        self.calls.append("wait")

    def send(self, value: Any, group: object = None) -> Any:
        self.calls.append("send")
        if self.main:
            self.sent.append(value)
            return value
        return self.sent[self.calls.count("send") - 1]


@contextmanager
def fake_group(rank: int, size: int) -> Iterator[World]:
    """Initialize torch's fake process group, whose collectives return at once, with what was in their outputs."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, rank)
    finally:
        dist.destroy_process_group()
