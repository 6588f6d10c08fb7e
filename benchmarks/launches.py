"""Count the operations that a training step starts on a GPU, without one.

    python benchmarks/launches.py
    python benchmarks/launches.py --rows vit+spt+lsa,recipe=lee2021 vit96,recipe=quick

A small model on a large GPU waits for the host, which takes some microseconds to start an operation. Operations are
counted as PyTorch dispatches them, without views and allocations: a fused or foreach operation counts once. Constants
that are kept from step to step are not counted. All of it is in fp32: mixed precision adds casts.

    augmentation               on fake GPU tensors, with the copies from the host
    forward, loss, backward    on the CPU
    clipping                   of the gradients, in foreach form
    optimizer                  in foreach or fused form, which PyTorch chooses on GPUs
    average                    the moving average of the weights, in foreach form

`--operators` lists the operations of each phase.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import wide_console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from smallvit import Config
from smallvit.config.spec import parse_spec
from smallvit.datasets.augment import Augment
from smallvit.models.factory import create_model, default_patch_size, resolve_arch
from smallvit.training.launch import resolve
from smallvit.training.losses import create_objective
from smallvit.training.optim import create_average, create_optimizer

CUDA, CLASSES = torch.device("cuda", 0), 100
ROWS = (
    "vit+spt+lsa,recipe=lee2021",
    "vit,recipe=lee2021",
    "vit96+stem+lsa+ffn,recipe=best",
    "deit_tiny_patch16_224,recipe=deit",
)
PHASES = ("augmentation", "forward", "loss", "backward", "clipping", "optimizer", "average")
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "_unsafe_view", "device", "promote_types"),
    "_local_scalar_dense",  # of the optimizers' step counts, which are on the host
}
"""Operations that compute nothing on a device."""


class LaunchCounter(TorchDispatchMode):
    """Count the operations in its context that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copies = 0
        """Copies from the host to a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and not function.is_view and name not in NO_LAUNCH:
            self.counts[name] += 1
            if name == "_to_copy" and args[0].device != result.device:
                self.copies += 1
        return result


def count_augmentation(config: Config, batch_size: int, size: int) -> LaunchCounter:
    """Count the operations that augment one batch."""
    augment = Augment.from_config(config.augment, size, flip=True)
    draws = augment.draw(np.random.default_rng(0), batch_size, size, size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(batch_size, 3, size, size, dtype=torch.uint8, device=CUDA)
        labels = torch.empty(batch_size, dtype=torch.int64, device=CUDA)
        mean, std = (torch.empty(3, 1, 1, device=CUDA) for _ in range(2))
        with LaunchCounter() as counter:
            augment.apply(pixels, labels, draws, mean, std, CLASSES)
    return counter


def count_step(model: torch.nn.Module, config: Config, size: int) -> dict[str, LaunchCounter]:
    """Count the operations of each later phase of a model's second step."""
    optimizer, average = create_optimizer(model, config.optim), create_average(model, config.optim)
    objective = create_objective(config.optim)
    images, targets = torch.rand(2, 3, size, size), torch.rand(2, CLASSES)
    for step in range(2):
        counters = {phase: LaunchCounter() for phase in PHASES[1:]}
        optimizer.zero_grad()
        with counters["forward"]:
            outputs = model(images)
        with counters["loss"]:
            loss = objective(lambda _, outputs=outputs: outputs, images, targets)["loss"]
        with counters["backward"]:
            loss.backward()
        if config.optim.clip_grad is not None:
            with counters["clipping"]:
                clip_grad_norm_(model.parameters(), config.optim.clip_grad, foreach=True)
        with counters["optimizer"]:
            optimizer.step()
        if average is not None:
            with counters["average"]:
                average.update(model, step + 1)
    return counters


def count_row(row: str, size: int) -> dict[str, LaunchCounter]:
    """Count the operations of the phases of a step with a row's model and recipe."""
    spec = parse_spec(row)
    config = resolve(Config.build(**spec.given({"data": "cifar100"}, spec.recipe)))
    arch = config.model.arch
    patch_size = config.model.patch_size or default_patch_size(arch, size)
    options = config.model.spec | {"arch": resolve_arch(arch, size), "patch_size": patch_size}
    model = create_model(**options, img_size=size, num_classes=CLASSES).train()
    augmentation = count_augmentation(config, int(config.optim.batch_size), size)
    with patch("timm.optim._helpers._default_to_fused_or_foreach", return_value=(False, True), create=True):
        return {"augmentation": augmentation} | count_step(model, config, size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the operations of each row and print a table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="rows of smallvit compare")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--operators", action="store_true", help="list the operations of each phase")
    given = parser.parse_args(arguments)
    table = Table("row", PHASES[0], "of these copies", *PHASES[1:], "step")
    details = Table("row", "phase", "operations")
    for row in given.rows:
        counters = count_row(row, given.img_size)
        first, *others = (counters[phase].counts.total() for phase in PHASES)
        table.add_row(row, *map(str, (first, counters[PHASES[0]].copies, *others, first + sum(others))))
        for phase, counter in counters.items():
            details.add_row(row, phase, ", ".join(f"{name} {n}" for name, n in counter.counts.most_common()))
    console = wide_console()
    console.print(table)
    if given.operators:
        console.print(details)


if __name__ == "__main__":
    main()
