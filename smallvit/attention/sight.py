"""What a trained model attends to in a few images: maps, and figures of every layer and head.

Axes: n images, b images at once, h heads, i j rows and columns of tokens, c channels, y x pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smallvit import attention, learnt, watching
from smallvit.attention.examples import Example
from smallvit.attention.flow import relevance, rollout
from smallvit.attention.gaze import View
from smallvit.errors import InputError
from smallvit.hardware import autocast
from smallvit.plugins import temperatures
from smallvit.ready import Ready
from smallvit.runs import Run

MEMORY = 2**29
"""Bytes that relevance may take, about."""
COPIES = 7
"""What relevance takes in all, in the maps' own bytes: measured of ViT-S/16 at 224 pixels, less with more tokens."""
MOST = 64
"""Images that are looked at together, at most."""


FIGURES = ("even_entropy", "even_distance", "entropy", "distance")
"""Of layers, and of heads."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a trained model attends to in some images."""

    model: Ready
    shown: Sequence[Example]
    layers: list[dict[str, Any]]
    """Plain figures of every attention layer, in the order of computation; of heads, in the mean over the images.

    `keys` is how many tokens are attended to at once, `grid` how those of the image lie; `even_entropy` and
    `even_distance` are what there would be if all in a token's reach were attended to alike. The distances are None
    where no token of the image asks.
    """
    maps: dict[str, Float[np.ndarray, "n h i j"]]
    """Where what the head reads looks in each layer, as `AttentionMap.image` has it."""
    rollout: Float[np.ndarray, "n i j"]
    relevance: Float[np.ndarray, "n i j"]
    predicted: list[str]
    probability: list[float]

    @property
    def views(self) -> list[View]:
        """What the model makes of each image."""
        last = self.maps[self.layers[-1]["layer"]].mean(axis=1)
        maps = zip(last, self.rollout, self.relevance, strict=True)
        answers = zip(self.predicted, self.probability, maps, strict=True)
        return [View(predicted=name, probability=share, maps=three) for name, share, three in answers]

    @property
    def record(self) -> dict[str, Any]:
        """Plain figures of layers and images."""
        answers = zip(self.shown, self.predicted, self.probability, strict=True)
        return {
            "name": self.model.card.name,
            "layers": self.layers,
            "images": [
                {"source": each.source, "predicted": predicted, "probability": probability, "label": each.label}
                for each, predicted, probability in answers
            ],
            "weights_sha256": learnt.weights_sha256(self.model.card),
            "img_size": self.model.img_size,
            "precision": self.model.precision,
        }

    @property
    def course(self) -> list[dict[str, Any]]:
        """The epochs of the model's run that recorded temperatures.

        Raises:
            InputError: the record is damaged.
        """
        folder = Path(os.path.expanduser(self.model.card.name))
        if not (folder / Run.CONFIG).exists():
            return []
        return [line for line in watching.read(folder).history if line.get("temperatures")]


def see(model: Ready, shown: Sequence[Example], classes: Sequence[int] | None, advance: Callable[[int], Any]) -> Sight:
    """Have a model look at images; the relevance is that for `classes`, by default for those predicted.

    `advance` is told of every few images that are done.

    Raises:
        InputError: the model has no attention that can be seen, or its answers are not finite.
    """
    parts, layers = [], []
    together = images_at_once(model)
    for start in range(0, len(shown), together):
        few = slice(start, start + together)
        images = model.normalised(torch.from_numpy(np.stack([example.pixels for example in shown[few]])))
        chosen = None if classes is None else torch.tensor(classes[few], device=model.device)
        layers, found = _look(model, images, chosen)
        parts.append({what: value.float().cpu().numpy() for what, value in found.items()})
        advance(len(images))
    whole = {what: np.concatenate([part[what] for part in parts]) for what in parts[0]}
    for layer in layers:
        for what in FIGURES:
            values = whole[what, layer["layer"]].mean(axis=0)
            layer[what] = None if np.isnan(values).any() else values.tolist()
        layer |= learnt_temperature(model.model, layer["layer"])
    return Sight(
        model=model,
        shown=shown,
        layers=layers,
        maps={layer["layer"]: whole["map", layer["layer"]] for layer in layers},
        rollout=whole["rollout", ""],
        relevance=whole["relevance", ""],
        predicted=[model.class_names[number] for number in whole["probabilities", ""].argmax(axis=1)],
        probability=whole["probabilities", ""].max(axis=1).tolist(),
    )


def require_attention(model: Ready) -> None:
    """Check that a model has attention that can be seen, by an image of nothing.

    Raises:
        InputError: it has none (a CNN), or of a kind that rollout cannot follow, or no classes.
    """
    if not model.card.spec["num_classes"]:
        raise model.card.error("the model has no classes that could be predicted")
    try:
        _look(model, _nothing(model), None)
    except InputError as error:
        raise model.card.error(str(error)) from None


def images_at_once(model: Ready) -> int:
    """How many images can be looked at together, by the size of the maps of one."""
    with autocast(model.device, model.dtype), torch.no_grad():
        _, maps = attention.record(model.model, _nothing(model))
    return min(MOST, max(1, MEMORY // (COPIES * sum(each.weights.nbytes for each in maps))))


def learnt_temperature(model: nn.Module, layer: str) -> dict[str, Any]:
    """The temperatures that a layer has learnt, one for each head or one for all, and what they began with."""
    found = temperatures(model).get(layer)
    if found is None:
        return {"temperature": None, "initial_temperature": None}
    began = vars(model.get_submodule(layer)).get("scale", 1.0)  # timm's constant, which stays beside the temperature
    return {"temperature": found.tolist(), "initial_temperature": began}


def _nothing(model: Ready) -> Float[Tensor, "1 c y x"]:
    return torch.zeros(1, model.in_chans, model.img_size, model.img_size, device=model.device)


def _look(
    model: Ready, images: Float[Tensor, "b c y x"], classes: Int64[Tensor, " b"] | None
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Tensor]]:
    """What every layer is, and values for each image by their kind and layer."""
    with autocast(model.device, model.dtype):
        layers, found = _seen(model, images)  # and the maps are gone
        found["relevance", ""] = relevance(model.model, images, classes)
    return layers, found


def _seen(model: Ready, images: Float[Tensor, "b c y x"]) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Tensor]]:
    """The same, without relevance."""
    with torch.no_grad():
        logits, maps = attention.record(model.model, images)
    if not logits.isfinite().all():
        raise InputError("its answers are not finite: these weights are of no use")
    layers = [
        {
            "layer": each.layer,
            "heads": each.weights.shape[-3],
            "grid": list(each.grid),
            "keys": each.weights.shape[-1],
        }
        for each in maps
    ]
    found = {("probabilities", ""): logits.float().softmax(dim=1), ("rollout", ""): rollout(maps)}
    for each in maps:
        even = each.even()
        found["map", each.layer] = each.image()
        found["entropy", each.layer], found["distance", each.layer] = each.entropy(), each.distance(model.img_size)
        for what, value in (("even_entropy", even.entropy()), ("even_distance", even.distance(model.img_size))):
            found[what, each.layer] = value[0, 0].expand(len(images))
    return layers, found
