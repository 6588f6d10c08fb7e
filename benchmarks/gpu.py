"""Test and measure smallvit on a GPU in at most ten minutes.

    python benchmarks/gpu.py                                   # on a machine with a CUDA GPU
    python benchmarks/gpu.py --data DIR                        # with CIFAR-10 in a folder, instead of a download
    python benchmarks/gpu.py --device cpu --batch-size 4 --rounds 1 --steps 1 --track digits --seeds 1    # to try it

1. The tests marked `gpu`.
2. Training steps of the five architectures with SPT and LSA, compiled and not: images per second, and the share of the
   rate at which the GPU multiplies large square matrices in the same precision. Images are fixed; augmentation is not
   included.
3. The speed run (benchmarks/speedrun), one seed by default.

Each part has the time that the parts before it leave of --minutes; what does not fit is reported as such.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import describe_machine, measure_seconds, options_parser, wide_console
from rich.console import Console
from rich.table import Table
from train_step import PRECISION, Form, Setting, Trainer, matmul_peak

from smallvit.models.architectures import LEE2021
from smallvit.profiling.flops import count_macs
from smallvit.utils.hardware import pick_device, pick_dtype

ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.5
"""Share of the time that is left from which no other form is measured, so that the speed run fits."""


def run_part(command: Sequence[str], deadline: float, console: Console) -> str:
    """Run a command in the repository until the deadline; print its last lines, and return how it ended."""
    console.print(f"$ {shlex.join(command)}", soft_wrap=True)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=max(1.0, deadline - time.monotonic()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return "not finished in time"
    console.print("\n".join(done.stdout.splitlines()[-20:]), markup=False, highlight=False)
    return "passed" if done.returncode == 0 else f"failed (exit code {done.returncode})"


def measure_steps(setting: Setting, steps: int, deadline: float) -> Table:
    """Measure the training steps of each architecture, compiled and not, until the deadline."""
    dtype = pick_dtype(setting.device, "auto")
    peak = matmul_peak(setting, dtype)
    title = f"training steps, {setting.size} px, batch {setting.batch}, {PRECISION[dtype]}, SPT + LSA"
    caption = f"of peak: of {peak / 1e12:.1f} TFLOP/s, measured; 6 FLOPs per multiply-accumulate of the forward pass"
    table = Table("model", "form", "ms per step", "images/s", "of peak", title=title, caption=caption)
    batch = setting.fixed_batch()
    for compiled in (False, True) if setting.device.type == "cuda" else (False,):
        for arch in LEE2021:
            if time.monotonic() > deadline:
                table.add_row(arch, "compiled" if compiled else "eager", "no time left", "", "")
                continue
            trainer = Trainer(Form(dtype, compiled=compiled), True, replace(setting, arch=arch))
            macs = count_macs(trainer.model, 3, setting.size)
            call = partial(trainer.step, *batch)
            for _ in range(3):
                call()
            seconds = statistics.median(measure_seconds(call, setting.device, steps) for _ in range(setting.rounds))
            rate = setting.batch / seconds
            share = f"{100 * 6 * macs * rate / peak:.1f} %"
            table.add_row(arch, "compiled" if compiled else "eager", f"{1e3 * seconds:.2f}", f"{rate:,.0f}", share)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if tests failed or the target of the speed run was missed."""
    parser = options_parser(__doc__, batch_size=1024, rounds=5)
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of the whole")
    parser.add_argument("--track", default="cifar10", help="track of the speed run")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the speed run")
    parser.add_argument("--data", help="folder with the images of the speed run [downloaded]")
    given = parser.parse_args(arguments)
    console, start = wide_console(), time.monotonic()
    deadline = start + 60 * given.minutes
    device = pick_device(given.device)
    console.print(describe_machine(device))
    results = {}
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", "-rs", "tests/training/test_gpu.py"]
    results["tests"] = run_part(tests, start + 0.4 * (deadline - start), console)
    setting = Setting("vit", device, given.img_size, given.batch_size, given.rounds)
    now = time.monotonic()
    console.print(measure_steps(setting, given.steps, now + SHARE * (deadline - now)))
    torch.cuda.empty_cache()  # for the speed run's process
    record = [sys.executable, "benchmarks/speedrun/run.py", given.track, "--seeds", str(given.seeds)]
    record += ["--device", device.type, *(["--data", given.data] if given.data else [])]
    results["speed run"] = run_part(record, deadline, console)
    for name, result in results.items():
        console.print(f"{name}: {result}")
    console.print(f"{time.monotonic() - start:.0f} s")
    return 0 if all(result == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
