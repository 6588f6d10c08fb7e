"""Start the other processes of a run on a CPU; with one thread each they are often faster than one with all threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import torch

from smallvit.config.config import Config
from smallvit.utils.cores import THREAD_VARIABLES
from smallvit.utils.errors import InputError, print_message
from smallvit.utils.hardware import pick_device

LEAST_IMAGES = 16
"""Minimum number of images of a batch for each process, for auto."""
GRACE_SECONDS = 20.0
"""Time in which this process notices that another has died, before it is ended."""


def count_processes(config: Config) -> int:
    """Return how many processes --processes asks for.

    Raises:
        InputError: Several, though the device is no CPU, or the machine has fewer threads.
    """
    asked, threads = config.compute.processes, torch.get_num_threads()
    on_cpu = pick_device(config.compute.device).type == "cpu"
    batch = config.optim.batch_size
    if asked == "auto":
        return max(1, min(threads, batch // LEAST_IMAGES)) if on_cpu and batch != "auto" else 1
    count = int(asked)
    if count > 1 and not on_cpu:
        raise InputError(f"--processes {count}: for CPUs; several GPUs: torchrun --nproc-per-node N -m smallvit train")
    if count > threads:
        raise InputError(f"--processes {count}: expected at most {threads}, the number of threads")
    return count


@contextmanager
def start_processes(config: Config) -> Iterator[None]:
    """Start the other processes of a run as torchrun would, and share the threads among them.

    They have their own session: a terminal's signals reach this process alone, which agrees with them on stopping.
    """
    if "WORLD_SIZE" in os.environ or (count := count_processes(config)) == 1:
        yield
        return
    threads = torch.get_num_threads()
    share = threads // count
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    first, *rest = [{name: str(value) for name, value in each.items()} for each in ranks]
    command = [sys.executable, "-P", "-m", "smallvit", "train"]  # the first process sends the options
    limits = dict.fromkeys(THREAD_VARIABLES, str(share))
    others, done = [], Event()
    try:
        for variables in rest:
            environment = os.environ | limits | variables
            others.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))
        os.environ.update(first)
        torch.set_num_threads(share)
        Thread(target=_watch, args=(others, done), daemon=True).start()
        yield
        for other in others:
            other.wait()
    finally:
        done.set()
        for other in others:
            other.kill()  # has no effect on those that have ended; they write nothing
            other.wait()
        torch.set_num_threads(threads)
        for name in first:
            os.environ.pop(name, None)


def _watch(others: list[subprocess.Popen[bytes]], done: Event) -> None:
    """End this process if another one dies before they have met; after that, torch.distributed notices it."""
    while not done.wait(1.0):
        if any(other.poll() for other in others):
            if not done.wait(GRACE_SECONDS):
                print_message("error: a process of --processes has died; see its message above, or resume the run")
                os._exit(1)
            return
