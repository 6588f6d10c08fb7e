"""What a profile found, as a table, a page and lines of text. Reads plain records, imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from smallvit.costs import savings
from smallvit.report import markdown

NO_MEMORY = "no memory"
MEASURES = (
    "Parameters: trainable values. MACs: multiply-accumulates of one image's forward pass. Tokens: of the first layer "
    "that attends. Activations: what each further image adds to what training keeps for its backward pass, parameters "
    "aside"
)
COUNTED_ON = {
    "cuda": "by the GPU's allocator",
    "cpu": "the largest sum of the allocations that torch's profiler recorded, without the libraries' scratch memory",
}


def columns(found: dict[str, Any]) -> dict[str, str]:
    """A profile's columns for people, by the figure that each shows."""
    titles = {
        "model": "model",
        "img_size": "pixels",
        "tokens": "tokens",
        "parameters": "parameters",
        "macs": "MACs (M)",
        "activation_bytes_per_image": "activations (MB/image)",
        "step_peak_bytes": f"step of {found['step_batch_size']} (MB)",
        "latency_ms": "latency, iqr (ms)",
        **{f"images_per_second_{batch}": f"images/s by {batch}" for batch in found["batch_sizes"]},
    }
    titles = {name: title for name, title in titles.items() if name in found["rows"][0]}
    return savings.joined(titles, found["rows"])


def table(found: dict[str, Any]) -> Table:
    """A profile for the terminal; `found` is what `profiling.measure` gives."""
    shown, titles = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False), columns(found)
    for name, title in titles.items():
        shown.add_column(title.replace(" ", "\n", 1), justify="left" if name == "model" else "right", no_wrap=True)
    for record in found["rows"]:
        shown.add_row(*(Text(_cell(record, name)) for name in titles))
    return shown


def page(found: dict[str, Any], lines: Sequence[str], picture: str | None) -> str:
    """A profile in Markdown: the table, lines that say how it came about, and a picture, if there is one."""
    titles = columns(found)
    text = markdown([list(titles.values()), *([_cell(record, name) for name in titles] for record in found["rows"])])
    said = "\n".join(f"- {line}" for line in lines)
    return f"# Costs\n\n{text}\n\n{said}\n" + (f"\n![growth with the image size]({picture})\n" if picture else "")


def notes(found: dict[str, Any]) -> list[str]:
    """How each figure came about, a line each."""
    lines = [MEASURES, *savings.notes(found["rows"])]
    if found["device"] in COUNTED_ON:
        lines.append(
            f"Step: most that tensors take at once while AdamW fits the model to {found['step_batch_size']} images "
            f"(weights, gradients, optimiser, activations), {COUNTED_ON[found['device']]}"
        )
    lines.append(
        f"Latency, images/s: inference on {found['hardware']}, {found['precision']}, not compiled; one image, waiting "
        f"for the answer, and batches; medians of {found['rounds']} rounds in which the models take turns, iqr the "
        "range of the middle half"
    )
    if "growth" in found:
        lines.append(_grown(found["growth"]))
    titles = columns(found) | {"ms_per_image": "milliseconds per image"}
    for record in (*found["rows"], *found.get("growth", [])):
        if record["out_of_memory"]:
            short = ", ".join(titles[name] for name in record["out_of_memory"].split())
            lines.append(f"{record['model']} at {record['img_size']} pixels: memory was short for {short}")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [*lines, f"Versions: {versions}", f"Command: {found['command']}"]


def _grown(records: Sequence[dict[str, Any]]) -> str:
    made: dict[int, list[str]] = {}
    for label, patch in dict.fromkeys((record["model"], record["patch_size"]) for record in records):
        if patch is not None:
            made.setdefault(patch, []).append(label)
    patches = ", ".join(f"{patch} px ({', '.join(labels)})" for patch, labels in made.items())
    known = [r for r in records if r["attention_macs_formula"] is not None]
    off = [r for r in known if r["attention_macs"] != r["attention_macs_formula"]]
    equal = f"in {len(known) - len(off)} of {len(known)} points" if known else "for none of these models"
    return (
        f"Growth: the same patches throughout{': ' + patches if patches else ''}; milliseconds per image in batches of "
        f"{records[0]['batch_size']}; the MACs of attention are those of the formula {equal}"
    )


def _cell(record: dict[str, Any], name: str) -> str:
    """A figure in words."""
    value = record[name]
    if value is None:
        return NO_MEMORY if name in (record["out_of_memory"] or "").split() else "–"
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
