"""Measure how long the processes of a run take to list a large folder and to load the first batch.

    python benchmarks/start.py make FOLDER [--count 1280000]     # writes hard links to a small JPEG in 1,000 folders
    python benchmarks/start.py measure FOLDER [--processes 8]

The processes start as those of a training run: the first one alone, then the others at once. The cache is empty before
the first one. With --list they only list the files, which needs less memory. Each figure is wall time and CPU time of a
process; those of the others are means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINKS = 60_000
"""Hard links to a file; ext4 allows 65,000."""
CLASSES = 1000


def make(folder: Path, count: int) -> None:
    """Write class folders with hard links to a JPEG."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    folder.mkdir(parents=True)
    original = folder / ".original.jpg"  # hidden files are not listed
    for number in range(CLASSES):
        inner = folder / f"n{number:08}"
        inner.mkdir()
        for index in range(number * count // CLASSES, (number + 1) * count // CLASSES):
            if index % LINKS == 0:
                original.unlink(missing_ok=True)
                picture.save(original)
            os.link(original, inner / f"{inner.name}_{index}.JPEG")


def run(folder: Path, only_list: bool) -> dict[str, float]:
    """List the files, load the data set and a batch in this process; return seconds, CPU seconds and memory."""
    import resource

    import torch

    from smallvit import datasets
    from smallvit.config.options import AugmentConfig, DataConfig
    from smallvit.datasets.augment import Augment
    from smallvit.datasets.image_folder import list_folder
    from smallvit.datasets.loader import create_train_loader

    start, cpu = time.perf_counter(), time.process_time()
    if only_list:
        list_folder(folder)
    else:
        data = datasets.create_dataset(DataConfig(data=str(folder), img_size=64, streaming="on", workers=0))
        augment = Augment.from_config(AugmentConfig(aug="none"), 64, data.flip)
        next(create_train_loader(data, 128, augment, 0, torch.device("cpu")).epoch(0))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "gib": memory}


def measure(folder: Path, processes: int, only_list: bool) -> None:
    """Print the figures of the first process, the others, and the first process of the next start."""
    command = [sys.executable, __file__, "run", str(folder), *["--list"] * only_list]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"SMALLVIT_CACHE": cache, "OMP_NUM_THREADS": "1"}
        for title, count in (("first process", 1), ("others, at once", processes - 1), ("next start", 1)):
            started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(count)]
            results = [json.loads(each.communicate()[0]) for each in started]
            if results:
                means = {name: sum(result[name] for result in results) / count for name in results[0]}
                figures = f"{means['seconds']:.1f} s, {means['cpu']:.1f} CPU s, {means['gib']:.2f} GiB"
                print(f"{title} ({count}): {figures}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make the folder, measure, or run one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["make", "measure", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1_280_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    if options.step == "make":
        make(options.folder, options.count)
    elif options.step == "measure":
        measure(options.folder, options.processes, options.list)
    else:
        print(json.dumps(run(options.folder, options.list)))


if __name__ == "__main__":
    main()
