"""Where the time of a few steps goes: torch's profiler, as a trace to open in a browser and as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, schedule

from smallvit.files import replacing, write_text
from smallvit.runs import Run
from smallvit.setup import Setup

SKIPPED, STEPS = 4, 5
"""Steps before recording begins (compiling, warming up), and recorded."""
ROWS = 30
BACKWARD = "autograd::engine::evaluate_function"
STAGES = ("forward", "backward", "optimiser", "moving average")


@contextmanager
def tracing(run: Run, setup: Setup, console: Console) -> Iterator[Callable[[], None]]:
    """A function to call after each step; with --profile, some steps are recorded into the run's folder."""
    if not (setup.config.run.profile and setup.world.main):
        yield lambda: None
        return
    gpu = setup.device.type == "cuda"
    done = False

    def write(profiler: profile) -> None:
        nonlocal done
        if profiler.step_num < SKIPPED + 1 + STEPS:
            return  # training ended while it recorded
        done = True
        with replacing(run / Run.TRACE) as partial:
            profiler.export_chrome_trace(str(partial))
        write_text(run / Run.PROFILE, table(profiler, gpu))
        console.print(f"trace  {run / Run.TRACE} (for chrome://tracing or ui.perfetto.dev), {run / Run.PROFILE}")

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it writes over the progress bar
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    plan = schedule(skip_first=SKIPPED, wait=0, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if not done:
        console.print(f"no trace: --profile needs {SKIPPED + 1 + STEPS} steps, of an epoch or several")


def _stages(averages: EventList, gpu: bool) -> dict[str, float]:
    """Microseconds of the stages that occurred; on a GPU those of the work that they began."""
    hosts = [each for each in averages if each.device_type == DeviceType.CPU]
    field = "device_time_total" if gpu else "cpu_time_total"
    spent = {each.key: getattr(each, field) for each in hosts if each.key in STAGES}
    if gpu:  # autograd works in a thread of its own
        spent["backward"] = sum(each.device_time_total for each in hosts if each.key.startswith(BACKWARD))
    return {stage: spent[stage] for stage in STAGES if stage in spent}


def table(profiler: profile, gpu: bool) -> str:
    """The stages of a step, then the operations that took the most time."""
    averages = profiler.key_averages()
    steps = max(1, sum(each.count for each in averages if each.key == "optimiser"))
    lines = [f"{stage:16} {spent / steps / 1000:10.2f} ms a step" for stage, spent in _stages(averages, gpu).items()]
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    return "\n".join([*lines, "", averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60), ""])
