"""Profile a few training steps with torch's profiler, as a trace file and a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from torch.profiler import ProfilerActivity, profile, schedule

from smallvit.runs.run import Run
from smallvit.training.setup import Setup
from smallvit.utils.files import atomic_write, write_text

SKIPPED, STEPS = 4, 5
"""Steps before recording (compilation, warmup), and recorded steps."""
ROWS = 40


@contextmanager
def record_trace(run: Run, setup: Setup, console: Console) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step, which records a few steps into the run folder."""
    gpu = setup.device.type == "cuda"
    done = False

    def write(profiler: profile) -> None:
        nonlocal done
        if profiler.step_num < SKIPPED + 1 + STEPS:
            return  # training ended while it recorded
        done = True
        with atomic_write(run / Run.TRACE) as partial:
            profiler.export_chrome_trace(str(partial))
        order = f"self_{'device' if gpu else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        write_text(run / Run.PROFILE, table + "\n")
        console.print(f"trace  {run / Run.TRACE} (for chrome://tracing or ui.perfetto.dev), {run / Run.PROFILE}")

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it writes over the progress bar
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    plan = schedule(skip_first=SKIPPED, wait=0, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if not done:
        console.print(f"no trace: --profile needs {SKIPPED + 1 + STEPS} steps, of an epoch or several")
