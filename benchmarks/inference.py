"""Compare the inference of ViTs with and without SPT and LSA: patched, fused, and exported programs.

    python benchmarks/inference.py [--arch vit] [--img-size 32] [--batch-size 64] [--rounds 300] [--exported]

The forms take turns, in fp32, for one image and for a batch (a tenth of the rounds). The table has medians over the
rounds, and medians of the rounds' ratios to the same form of the model without plugins, which other load on the machine
changes least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from common import describe_machine, measure_in_turns, median_ratio, options_parser, wide_console
from rich.table import Table
from torch import Tensor, nn

from smallvit.models.factory import create_model, prepare_for_inference
from smallvit.plugins.patch import fuse
from smallvit.utils.hardware import pick_device

PLUGINS = ("", "+spt", "+lsa", "+spt+lsa")
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
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    with torch.inference_mode(False):
        models = forms(options, device)
    times = []
    for batch, rounds in ((1, options.rounds), (options.batch_size, max(1, options.rounds // 10))):
        images = torch.randn(batch, 3, options.img_size, options.img_size, device=device)
        calls = {name: lambda model=model, images=images: model(images) for name, model in models.items()}
        times.append(measure_in_turns(calls, rounds, device, warm_up=3))
    console = wide_console()
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(f"{describe_machine(device)}, {threads}, fp32, {options.img_size} px, {options.rounds} rounds")
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
