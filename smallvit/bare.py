"""Weights files that do not say what they are: plain state dicts, of a model that is named beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm
from safetensors.torch import load_file
from torch import nn

from smallvit import headers, models, pretrained
from smallvit.inherit import ADDED
from smallvit.trained import Card


def identified(card: Card, spec: dict[str, Any]) -> Card:
    """A card that says which model its file holds: that of `spec`, the same without plugins, or, in the form that
    another program has for it, timm's of this name; at the image size and with the classes that the tensors have.

    Raises:
        InputError: it is another model's.
    """
    if card.spec is not None:
        return card
    shapes, sizes = headers.shapes(card.path), headers.sizes(card.path, spec["patch_size"])
    misfits = []
    for candidate in _candidates(spec | sizes):
        model = models.create_model(**candidate)
        state = model.state_dict()
        if not (odd := sorted(state.keys() ^ shapes.keys())):
            return replace(card, spec=candidate | _classes(model, shapes))
        misfits.append((len(odd), odd[0], odd[0] in state))
    if timm.is_model(spec["arch"]):
        return pretrained.of_file(card, spec["arch"])
    _, name, lacks = min(misfits)
    what = f"it lacks {name}" if lacks else f"it has {name}, which the model has not"
    raise card.error(f"not the weights of --arch {spec['arch']} ({what})")


def load(card: Card) -> nn.Module:
    """The model of an identified card, with its weights, in evaluation mode.

    Raises:
        InputError: they do not fit.
    """
    model = models.create_model(**card.spec)
    try:
        model.load_state_dict(load_file(card.path))
    except RuntimeError as error:
        raise card.error(
            f"does not fit --arch {card.spec['arch']} ({str(error).splitlines()[-1].strip()}); give --arch, "
            "--img-size and --patch-size as they were"
        ) from None
    return model.eval()


def _candidates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    if any(spec[plugin] for plugin in ADDED):
        yield spec | dict.fromkeys(ADDED, False)


def _classes(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """How many there are, by the head."""
    head = next((name for name in models.head_names(model) if len(shapes[name]) == 2), None)
    return {"num_classes": shapes[head][0]} if head else {}
