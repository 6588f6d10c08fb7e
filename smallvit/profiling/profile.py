"""Profile models side by side: parameters, operations, memory and time, at several image sizes.

All models are created once before anything is measured, so that invalid rows fail at once. Models take turns in what is
timed, and each has a time budget at each size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn

from smallvit.config import spec as specs
from smallvit.config.config import Config
from smallvit.config.model import ModelConfig
from smallvit.config.options import Amp
from smallvit.models import factory, weights_info
from smallvit.models.factory import fuse_for_inference, prepare_for_inference
from smallvit.plugins.resize import set_input_size
from smallvit.profiling import benchmark, flops
from smallvit.profiling.benchmark import ROUNDS, SECONDS, Stopwatch, Timing, run_if_memory_allows, take_turns
from smallvit.utils import files, hardware, tables
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.plots import save_figure
from smallvit.utils.sizes import ImageSize, height_width
from smallvit.utils.terminal import create_console, track

IMG_SIZE = 32
"""Image size of rows that are not runs."""
IN_CHANS = 3
"""Channels of rows that are not runs."""
GROWTH_SIZES = (32, 48, 64, 96, 128, 160, 224)
"""Image sizes of --growth; those that a model does not support are skipped."""
GROWTH_ROUNDS = 5
MIN_STEP_BATCH = 2
"""Images of the smallest training step; some batch norms cannot train on one image."""
MODEL_OPTIONS = {option.name for option in fields(ModelConfig)}


# Rows


@dataclass(frozen=True, kw_only=True)
class ModelAtSize:
    """A row of a profile at one image size."""

    label: str
    spec: dict[str, Any]
    """Arguments of `create_model`, for the size that the model is created for."""
    img_size: ImageSize
    """Size of the images that it is measured on."""
    counts: dict[str, float | None]
    """Result of `count_costs`."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.spec["in_chans"], *height_width(self.img_size)


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A row of a profile. Costs do not depend on weights, so none are loaded."""

    label: str
    spec: dict[str, Any]
    """Arguments of `create_model`; those of a run include its image size."""

    def adapt_spec(self, img_size: ImageSize) -> dict[str, Any]:
        """Return the arguments of `create_model` with a patch size for this image size; a run's stay the same."""
        if "img_size" in self.spec:
            return self.spec
        arch, fit = self.spec["arch"], self.spec["fit"]
        return self.spec | {
            "img_size": img_size,
            "arch": factory.resolve_arch(arch, img_size, fit=fit),
            "patch_size": self.spec["patch_size"] or factory.default_patch_size(arch, img_size, fit=fit),
        }

    def at(self, img_size: ImageSize, spec: dict[str, Any] | None = None) -> ModelAtSize:
        """Create the model once at an image size and count its costs; `spec` keeps the patches of another size.

        Raises:
            InputError: The model cannot take these images.
        """
        try:
            spec = spec or self.adapt_spec(img_size)
            counts = count_costs(build_model(spec, img_size), spec["in_chans"], img_size)
        except InputError as error:
            raise InputError(f"row {self.label}: {error}") from None
        return ModelAtSize(label=self.label, spec=spec, img_size=img_size, counts=counts)

    def grow(self, sizes: Sequence[int]) -> list[ModelAtSize]:
        """Return the row at each size with the patches of the smallest; without `sizes`, at all supported sizes.

        Raises:
            InputError: A size is not supported.
        """
        models: list[ModelAtSize] = []
        for size in sorted(sizes or GROWTH_SIZES):
            try:
                models.append(self.at(size, models[0].spec if models else None))
            except InputError as error:
                if sizes:
                    raise
                last_error = error
        if not models:
            raise last_error
        return models


def parse_row(text: str, num_classes: int) -> ModelRow:
    """Parse a row: ARCH[+spt][+lsa][+binary][,option=value]..., or a run folder.

    Raises:
        InputError: There is no such model or run, or an option does not affect costs.
    """
    if files.is_path(text):
        info = weights_info.read_weights_info(text, "profile")
        if info.spec is None:
            raise info.error("this file of another program does not name its model; give the model's name")
        return ModelRow(label=text, spec=info.spec)
    row = specs.parse_spec(text)
    with row.named():
        other = [*(name for name in row.options if name not in MODEL_OPTIONS), *(["recipe"] if row.recipe else [])]
        if other:
            raise InputError(f"{other[0]} is not a model option and has no effect on costs; remove it")
        config = Config.build(**row.given({}, None)).model
        factory.require_known(config.arch)
    return ModelRow(label=row.label, spec=config.spec | {"in_chans": IN_CHANS, "num_classes": num_classes})


def build_model(spec: dict[str, Any], img_size: ImageSize) -> nn.Module:
    """Create a model; at another image size than that of `spec` with the same patches and windows.

    Raises:
        InputError: The model cannot take these images.
    """
    same = factory.resolve_arch(spec["arch"], img_size, fit=spec["fit"]) == spec["arch"]
    if img_size == spec["img_size"] or (spec["patch_size"] is not None and same):
        return factory.create_model(**spec | {"img_size": img_size})
    model = factory.create_model(**spec)
    try:
        return set_input_size(model, img_size) if hasattr(model, "set_input_size") else model  # CNNs take any size
    except Exception as error:  # models raise anything for unsupported sizes
        raise InputError(f"{spec['arch']} cannot take {img_size}-pixel images ({first_line(error)})") from None


def count_costs(model: nn.Module, in_chans: int, img_size: ImageSize) -> dict[str, float | None]:
    """Count a model's parameters, tokens, operations and bytes; None where a count does not apply.

    Tokens are those of the first attention layer.

    Raises:
        InputError: The model cannot take these images.
    """
    tokens: list[int] = []
    for layer in list(flops.find_attention(model).values())[:1]:
        layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:-1].numel()))
    macs = flops.count_macs_by_layer(model, in_chans, img_size)
    operations = flops.count_operations(model, macs)
    return {
        "tokens": tokens[0] if tokens else None,
        "parameters": flops.count_parameters(model),
        "macs": operations.macs,
        "bops": operations.bops,
        "flops": operations.flops,
        "ops": operations.ops,
        "packed_bytes": flops.count_packed_bytes(model),
        "float_bytes": flops.count_float_bytes(model),
        "attention_macs": flops.count_attention_macs(model, macs),
        "attention_macs_formula": flops.compute_attention_formula(model),
    }


# Measurement


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What to measure, and on which device."""

    rows: Sequence[ModelRow]
    img_sizes: Sequence[ImageSize] = ()
    """In pixels; by default a run's own, and 32."""
    batch_sizes: Sequence[int] = (1, 16, 128)
    """Batch sizes of inference; the first is used for growth, the largest for the training step."""
    growth: Sequence[int] | None = None
    """Image sizes of growth; () for all supported `GROWTH_SIZES`, None for no growth."""
    device: str = "auto"
    amp: Amp = "auto"
    seconds: float = SECONDS
    """Time budget of each model at each image size."""


def measure_models(
    models: Sequence[ModelAtSize],
    batches: Mapping[str, tuple[int, bool]],
    rounds: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    step_batch: int | None = None,
) -> list[dict[str, Any]]:
    """Measure models, memory one after the other and then time in turns; a value is None without memory or time.

    Args:
        models: The models.
        batches: Batch size of each value, and whether each pass is a sample.
        rounds: Rounds of samples.
        device: The device.
        dtype: Precision of matrix products.
        seconds: Time budget of each model.
        step_batch: Batch size of the training step, which is measured on GPUs only; None measures none.
    """
    records, timings = [], []
    for model in track(models, "warming up and memory"):
        loaded = prepare_for_inference(build_model(model.spec, model.img_size), device, dtype)
        fused = fuse_for_inference(loaded, device, dtype)
        watch = Stopwatch(fused, model.input_size, device, dtype, seconds)
        starts = {name: partial(_start_timing, watch, *batch) for name, batch in batches.items()}
        timings.append({name: run_if_memory_allows(start) for name, start in starts.items()})
        kept = run_if_memory_allows(
            partial(
                benchmark.activation_bytes, loaded, model.spec["in_chans"], model.img_size, device=device, dtype=dtype
            )
        )
        record = {"model": model.label, "img_size": model.img_size, "patch_size": model.spec["patch_size"]}
        records.append(record | model.counts | {"activation_bytes_per_image": kept})
        if step_batch is not None and device.type == "cuda":
            step = partial(benchmark.step_peak_bytes, loaded, watch.make_images(step_batch), dtype)
            records[-1]["step_peak_bytes"] = run_if_memory_allows(step)
    take_turns([row[name] for name in batches for row in timings if row[name] is not None], rounds)
    for record, row in zip(records, timings, strict=True):
        for name, timing in row.items():
            record |= {name: None, f"{name}_iqr": None} if timing is None else timing.summarize(name)
    return records


def _start_timing(watch: Stopwatch, batch: int, alone: bool) -> Timing | None:
    """Start to time batches; None without enough time for several images."""
    if watch.find_batch_size(batch) < batch or (batch > 1 and not watch.has_time_for(batch)):
        return None
    return Timing(watch, watch.make_images(batch), alone=alone)


def run_profile(config: ProfileConfig) -> dict[str, Any]:
    """Measure models and their growth.

    Returns:
        Records of the rows and of their growth, and what they depend on.

    Raises:
        InputError: There is no such device, or a row cannot take its images. Nothing is measured then.
    """
    device = hardware.pick_device(config.device)
    pairs = [(row, size) for row in config.rows for size in config.img_sizes or [row.spec.get("img_size", IMG_SIZE)]]
    models = [row.at(size) for row, size in track(pairs, "creating models")]
    growing: list[ModelAtSize] = []
    if config.growth is not None:
        growing = [model for row in track(config.rows, "counting") for model in row.grow(config.growth)]
    dtypes = {
        hardware.choose_dtype(
            device, config.amp, build_model(model.spec, model.img_size), model.spec["in_chans"], model.img_size
        )
        for model in models
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    measure = partial(measure_models, device=device, dtype=dtype, seconds=config.seconds)
    console = create_console(stderr=True)
    limit = (len(models) + len(growing)) * config.seconds
    labels = [row.label for row in config.rows]
    console.print(f"measuring {', '.join(labels)}: up to about {limit:.0f} s (--seconds {config.seconds:g})")
    batches = {"latency_ms": (1, True), **{f"images_per_second_{n}": (n, False) for n in config.batch_sizes}}
    step_batch = max(MIN_STEP_BATCH, *config.batch_sizes)
    records = measure(models, batches, track(range(ROUNDS), "time"), step_batch=step_batch)
    growth = []
    for size in sorted({model.img_size for model in growing}):  # those of the same size take turns
        same_size = [model for model in growing if model.img_size == size]
        growth += measure(same_size, {"ms_per_image": (config.batch_sizes[0], True)}, range(GROWTH_ROUNDS))
    growth.sort(key=lambda record: labels.index(record["model"]))
    return {
        "rows": records,
        **({} if config.growth is None else {"growth": growth}),
        "batch_sizes": list(config.batch_sizes),
        "step_batch_size": step_batch,
        "rounds": ROUNDS,
        "seconds": config.seconds,
        "device": device.type,
        "hardware": hardware.describe_hardware(device),
        "precision": hardware.precision_name(device, dtype),
        "versions": hardware.versions(),
        "git_revision": hardware.git_revision(),
    }


# Tables and figure


DEFINITIONS = (
    "Parameters: trainable values. MACs: multiply-accumulates of one image's forward pass. Tokens: of the first "
    "attention layer. Activations: what each further image adds to what is kept for the backward pass"
)


def get_columns(profile: dict[str, Any]) -> dict[str, str]:
    """Return the titles of a profile's columns, by the name of each value."""
    titles = {
        "model": "model",
        "img_size": "pixels",
        "tokens": "tokens",
        "parameters": "parameters",
        "macs": "MACs (M)",
        "activation_bytes_per_image": "activations (MB/image)",
        "step_peak_bytes": f"step of {profile['step_batch_size']} (MB)",
        "latency_ms": "latency, iqr (ms)",
        **{f"images_per_second_{batch}": f"images/s by {batch}" for batch in profile["batch_sizes"]},
    }
    titles = {name: title for name, title in titles.items() if name in profile["rows"][0]}
    return tables.with_binary_columns(titles, profile["rows"])


def list_cells(profile: dict[str, Any]) -> list[list[str]]:
    """Return the header and cells of a profile of `run_profile`."""
    columns = get_columns(profile)
    return [list(columns.values()), *([_format_cell(row, name) for name in columns] for row in profile["rows"])]


def format_markdown(profile: dict[str, Any], notes: Sequence[str], figure: str | None) -> str:
    """Format a profile as Markdown: a table, notes, and a figure if there is one."""
    table, listed = tables.markdown_table(list_cells(profile)), "\n".join(f"- {note}" for note in notes)
    return f"# Costs\n\n{table}\n\n{listed}\n" + (f"\n![growth with the image size]({figure})\n" if figure else "")


def list_notes(profile: dict[str, Any]) -> list[str]:
    """Describe how each value was measured, one line each."""
    lines = [DEFINITIONS, *tables.binary_notes(profile["rows"])]
    if profile["device"] == "cuda":
        lines.append(
            f"Step: peak memory of a training step with AdamW on {profile['step_batch_size']} images (weights, "
            "gradients, optimizer, activations), by the GPU's allocator"
        )
    lines.append(
        f"Latency, images/s: inference on {profile['hardware']}, {profile['precision']}, not compiled; latency of one "
        f"image, throughput of batches; medians of {profile['rounds']} rounds in which the models take turns, fewer "
        f"if a model's {profile['seconds']:g} s end before; iqr is the interquartile range"
    )
    if "growth" in profile:
        lines.append(
            "Growth: the patch size of the smallest image throughout; milliseconds per image in batches of "
            f"{profile['batch_sizes'][0]}; formulas of attention for ViTs and Swins"
        )
    if any(row[name] is None for row in profile["rows"] for name in get_columns(profile)):
        lines.append(f"{tables.MISSING}: does not apply, or does not fit into --seconds or memory")
    versions = ", ".join(f"{name} {version}" for name, version in profile["versions"].items())
    return [*lines, f"Versions: {versions}", f"Command: {profile['command']}"]


def _format_cell(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if value is None:
        return tables.MISSING
    match name:
        case "model":
            return value
        case "macs" | "bops" | "ops":
            return f"{value / 1e6:,.1f}"
        case "activation_bytes_per_image" | "packed_bytes":
            return f"{value / 1e6:,.2f}"
        case "step_peak_bytes":
            return f"{value / 1e6:,.0f}"
        case "latency_ms":
            return f"{value:.2f} ({record['latency_ms_iqr']:.2f})"
        case _:
            return f"{value:,.0f}"


PANELS = {
    "attention_macs": ("attention: MACs (M)", 1e6),
    "macs": ("model: MACs (M)", 1e6),
    "ms_per_image": ("inference: milliseconds per image", 1.0),
    "activation_bytes_per_image": ("activations kept for backward: MB per image", 1e6),
}
"""Titles and units of the figure's panels."""


def plot_growth(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot costs over the image size as a PNG, one panel per value; dashed lines are the formulas.

    Args:
        records: The `growth` records of `run_profile`.
        path: Output file.
        title: Title of the figure.
    """
    panels = {name: panel for name, panel in PANELS.items() if any(record[name] is not None for record in records)}
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    sizes = sorted({record["img_size"] for record in records})
    for number, (name, (words, unit)) in enumerate(panels.items()):
        axes = figure.add_subplot(2, 2, number + 1)
        axes.set(xscale="log", yscale="log", xlabel="image size (px)", title=words, xticks=sizes, xticklabels=sizes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        for color, label in enumerate(dict.fromkeys(record["model"] for record in records)):
            for key, style in ((name, "o-"), (f"{name}_formula", "x--")):
                points = [r for r in records if r["model"] == label and r.get(key) is not None]
                x, y = [r["img_size"] for r in points], [r[key] / unit for r in points]
                axes.plot(x, y, style, color=f"C{color}", label=label if key == name else None)
    figure.suptitle(title)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)
