"""On what a run is computed, and what it leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from smallvit.errors import InputError, nearest
from smallvit.options.checks import require

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `--log` takes; `smallvit.loggers` knows them."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the work is done: on what, and how fast; but for rounding and --sync-bn it changes no result."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """Mixed precision: auto uses bf16 where the hardware computes in it."""
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    """Compile the model by torch.compile; graphs also records CUDA graphs; auto: where a run is long enough to pay."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more work."""
    fsdp: bool = False
    """With torchrun: spread weights, gradients and optimiser state over the devices, for models that fit on none."""
    sync_bn: bool = False
    """With torchrun: batch norm over the images of all devices."""

    def __post_init__(self) -> None:
        if self.fsdp and self.sync_bn:
            raise InputError("--fsdp and --sync-bn do not go together: give up one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go, and what is kept and shown."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and every random draw."""
    out: str | None = None
    """Folder for the results; by default a new one, runs/<arch>-<plugins>-<data>."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    resume: str | None = None
    """Folder of a run to continue, with the configuration it was started with."""
    auto_resume: bool = False
    """Continue the run in --out if there is one: for jobs that are started again after an interruption."""
    checkpoint_minutes: float = 10.0
    """Longest time between two checkpoints; the end of an epoch writes one too."""
    keep: int = 0
    """Keep the weights of this many checkpointed epochs, the latest, beside last and best."""
    log: str | None = None
    """Send metrics to these loggers too: tensorboard, wandb, mlflow, trackio, or several with commas between."""
    profile: bool = False
    """Write a trace of a few steps and a table of where their time goes."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.out != "", "out", repr(self.out), "a folder")
        if self.overwrite and self.out is None:
            raise InputError("--overwrite needs --out DIR: which run to replace")
        if self.auto_resume and (self.out is None or self.overwrite):
            raise InputError("--auto-resume needs --out DIR, without --overwrite: which run to continue")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise InputError("--resume RUN goes on in RUN itself: leave out --out and --overwrite")
        require(
            0 < self.checkpoint_minutes < math.inf, "checkpoint_minutes", self.checkpoint_minutes, "more than 0 minutes"
        )
        require(self.keep >= 0, "keep", self.keep, "0 or more")
        require(self.log is None or bool(self.loggers), "log", repr(self.log), f"some of {', '.join(LOGGERS)}")
        for name in self.loggers:
            require(name in LOGGERS, "log", name, f"one of {', '.join(LOGGERS)}{nearest(name, LOGGERS)}")

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the loggers asked for."""
        return tuple(dict.fromkeys(name.strip() for name in (self.log or "").split(",") if name.strip()))
