"""Pictures of heads by the depth of their layers: entropy, distance, temperature. Imports no torch.

The records are the `layers` of an attention.json, by the name of their model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smallvit.files import replacing
from smallvit.words import printable

Records = Sequence[Mapping[str, Any]]
APART = 0.3
"""How far the dots of models stand from each other, in layers, all together."""
TICKS = 24
"""Most layers that are named."""


def draw_heads(models: Mapping[str, Records], path: Path) -> None:
    """Draw each head's entropy and distance against its layer's depth, a colour for each model."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    entropy, distance = figure.subplots(1, 2)
    for number, (name, layers) in enumerate(models.items()):
        shift = APART * (number - (len(models) - 1) / 2) / len(models)
        for axes, what in ((entropy, "entropy"), (distance, "distance")):
            _draw_model(axes, layers, what, shift, f"C{number}", name)
    entropy.set(ylabel="entropy of attention (nats)")
    distance.set(ylabel="mean distance of attention (pixels)")
    for axes in (entropy, distance):
        axes.plot([], [], "--", color="0.3", linewidth=1, label="if all tokens in reach were attended to alike")
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
        _name_layers(axes, max(models.values(), key=len))
    figure.suptitle("A dot is a head, in the mean over the images; a line joins the means over heads.", fontsize=9)
    _save(figure, path)


def draw_temperatures(models: Mapping[str, Records], courses: Mapping[str, Records], path: Path) -> bool:
    """Draw what temperatures have become, and how, where there is a course; returns whether there are any.

    A course's records are lines of a metrics.jsonl with temperatures.
    """
    learnt = {name: [layer for layer in layers if layer["temperature"]] for name, layers in models.items()}
    learnt = {name: layers for name, layers in learnt.items() if layers}
    if not learnt:
        return False
    columns = 2 if any(courses[name] for name in learnt) else 1
    figure = Figure(figsize=(1 + 5 * columns, 0.4 + 3.8 * len(learnt)), layout="constrained")
    panels = figure.subplots(len(learnt), columns, squeeze=False)
    for row, (name, layers) in zip(panels, learnt.items(), strict=True):
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
        _draw_final(row[0], layers, colours)
        row[0].set_title(printable(name), fontsize=9, parse_math=False)
        if courses[name]:
            _draw_course(row[1], courses[name], layers, colours)
        elif columns > 1:
            row[1].set_axis_off()
    _save(figure, path)
    return True


def _draw_model(axes: Axes, layers: Records, what: str, shift: float, colour: str, name: str) -> None:
    """A model's dots, the line of their means, and where they would be if all tokens were attended to alike."""
    known = [index for index, layer in enumerate(layers) if layer[what] is not None]
    depth, heads = np.array(known) + shift, [layers[index][what] for index in known]
    _dots(axes, depth, heads, [colour] * len(known))
    axes.plot(depth, [np.mean(values) for values in heads], color=colour, label=printable(name.lstrip("_")))
    axes.plot(depth, [layers[index][f"even_{what}"] for index in known], "--", color=colour, linewidth=1)


def _draw_final(axes: Axes, layers: Records, colours: np.ndarray) -> None:
    """A dot for each head, and what its layer began with."""
    depth = np.arange(len(layers))
    _dots(axes, depth, [layer["temperature"] for layer in layers], colours)
    began = [layer["initial_temperature"] for layer in layers]
    label = "at first: head_dim$^{-0.5}$"
    axes.hlines(began, depth - 0.5, depth + 0.5, colors="k", linestyles="--", linewidth=1, label=label)
    axes.set(ylabel="temperature of each head")
    axes.legend(fontsize=8)
    _name_layers(axes, layers)


def _draw_course(axes: Axes, course: Records, layers: Records, colours: np.ndarray) -> None:
    """A line for each head over the epochs that recorded it, in its layer's colour."""
    style = {"marker": "o", "markersize": 3} if len(course) < 10 else {}
    for layer, colour in zip(layers, colours, strict=True):
        known = [line for line in course if layer["layer"] in line["temperatures"]]
        heads = np.array([line["temperatures"][layer["layer"]] for line in known])
        axes.plot([line["epoch"] for line in known], heads, color=colour, linewidth=0.9, **style)
    for began in {layer["initial_temperature"] for layer in layers}:
        axes.axhline(began, color="k", linestyle="--", linewidth=1)
    axes.set_title("over training, in the colours of the layers", fontsize=9)
    axes.set(xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _dots(axes: Axes, depth: np.ndarray, heads: Sequence[Sequence[float]], colours: Sequence[Any]) -> None:
    for at, values, colour in zip(depth, heads, colours, strict=True):
        axes.plot([at] * len(values), values, "o", color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0)


def _name_layers(axes: Axes, layers: Records) -> None:
    """Ticks by what tells the layers' names apart."""
    names = [layer["layer"].split(".") for layer in layers]
    for end in (-1, 0):
        while len(names) > 1 and min(map(len, names)) > 1 and len({name[end] for name in names}) == 1:
            names = [name[:-1] if end else name[1:] for name in names]
    places = range(0, len(names), -(-len(names) // TICKS))
    told = [".".join(names[place]) for place in places]
    axes.set_xticks(places, told, rotation=90 if max(map(len, told)) > 3 else 0, fontsize=8)
    axes.set(xlabel="attention layer")
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
