"""Compare the inference of ViTs with and without SPT and LSA: patched, fused, and exported programs.

    python benchmarks/inference.py [--arch vit] [--batch-size 64] [--rounds 300] [--exported] [--cpu-time]

The forms take turns, in fp32, for one image and for a batch (a tenth of the rounds). The table has medians over the
rounds, and medians of the rounds' ratios to the same form of the model without plugins, which other load on the machine
changes least. --cpu-time measures one thread's time on the processor, for busy machines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import describe_machine, measure_in_turns, median_ratio, options_parser, wide_console
from rich.table import Table
from torch import Tensor, nn

from smallvit.models.factory import create_model, prepare_for_inference
from smallvit.plugins.patch import fuse
from smallvit.utils.hardware import pick_device

PLUGINS = ("", "+spt+lsa")
EXPORTED = ", torch.export"


def forms(options: object, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the models to time by name, that without plugins first."""
    models: dict[str, nn.Module] = {}
    for suffix in PLUGINS:
        name = options.arch + suffix
        model = create_model(name, img_size=options.img_size, num_classes=100)
        models[name] = prepare_for_inference(model, device, torch.float32)
        if suffix:
            models[f"{name}, fused"] = fuse(models[name])
    if options.exported:
        images = torch.randn(2, 3, options.img_size, options.img_size, device=device)
        for name in (options.arch, f"{options.arch}+spt+lsa, fused"):
            models[name](images)
            program = torch.export.export(models[name], (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            models[name + EXPORTED] = program.module()
    return models


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options_parser(__doc__, batch_size=64, rounds=300)
    parser.add_argument("--arch", default="vit")
    parser.add_argument("--exported", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args(argv)
    if options.cpu_time:
        torch.set_num_threads(1)
    device = pick_device(options.device)
    with torch.inference_mode(False):
        models = forms(options, device)
    times, clock = [], time.thread_time if options.cpu_time else time.perf_counter
    for batch, rounds in ((1, options.rounds), (options.batch_size, max(1, options.rounds // 10))):
        images = torch.randn(batch, 3, options.img_size, options.img_size, device=device)
        calls = {name: lambda model=model, images=images: model(images) for name, model in models.items()}
        times.append(measure_in_turns(calls, rounds, device, warm_up=3, clock=clock))
    console = wide_console()
    kind = "processor time of one thread" if options.cpu_time else "time"
    console.print(f"{describe_machine(device)}: {kind}, fp32, {options.img_size} px, {options.rounds} rounds")
    table = Table("model", "ms, 1 image", "over plain", f"ms, {options.batch_size} images", "over plain")
    for name in models:
        cells = []
        for each in times:
            plain = options.arch + EXPORTED * name.endswith(EXPORTED)
            ratio = median_ratio(each[name], each[plain])
            cells += [f"{1e3 * statistics.median(each[name]):.2f}", f"{100 * (ratio - 1):+.1f} %"]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
