"""Weights files that do not say what they are: plain state dicts, of a model that is named beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from smallvit import models, pretrained, trained
from smallvit.trained import Card

PLUGINS = ("spt", "lsa", "dist_token")


def identified(card: Card, spec: dict[str, Any]) -> Card:
    """A card that says which model its file holds: that of `spec`, the same without plugins, or, in the form that
    another program has for it, timm's of this name; at the image size and with the classes that the tensors have.

    Raises:
        InputError: it is another model's.
    """
    if card.spec is not None:
        return card
    shapes = trained.shapes(card.path)
    misfits = []
    for candidate in _candidates(spec):
        model = models.create_model(**candidate)
        state = model.state_dict()
        if not (odd := sorted(state.keys() ^ shapes.keys())):
            return replace(card, spec=candidate | _sizes(model, state, shapes, candidate))
        misfits.append((len(odd), odd[0], odd[0] in state))
    if timm.is_model(spec["arch"]):
        return pretrained.of_file(card, spec["arch"])
    _, name, lacks = min(misfits)
    what = f"it lacks {name}" if lacks else f"it has {name}, which the model has not"
    raise card.error(f"not the weights of --arch {spec['arch']} ({what})")


def load(card: Card) -> nn.Module:
    """The model of an identified card, with its weights.

    Raises:
        InputError: they do not fit.
    """
    model = models.create_model(**card.spec)
    try:
        model.load_state_dict(load_file(card.path))
    except RuntimeError as error:
        raise card.error(f"does not fit --arch {card.spec['arch']} ({str(error).splitlines()[-1].strip()})") from None
    return model


def _candidates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec
    if any(spec[plugin] for plugin in PLUGINS):
        yield spec | dict.fromkeys(PLUGINS, False)


def _sizes(
    model: nn.Module, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], spec: dict[str, Any]
) -> dict[str, int]:
    """Image size and number of classes, by the tensors that depend on them: position embeddings and heads."""
    head = next((name for name in models.head_names(model) if name.endswith("weight")), None)
    found = {"num_classes": shapes[head][0]} if head else {}
    for name, value in state.items():
        if name.endswith("pos_embed") and shapes[name] != tuple(value.shape):
            ratio = _tokens(shapes[name], model) / _tokens(tuple(value.shape), model)
            found["img_size"] = round(spec["img_size"] * ratio**0.5)
    return found


def _tokens(shape: tuple[int, ...], model: nn.Module) -> int:
    """Places for an image's tokens in a position embedding: (1, n, c), (1, i, j, c) or (1, c, i, j)."""
    if len(shape) == 3:
        return shape[1] - (model.pos_embed.shape[1] - model.patch_embed.num_patches)
    return shape[1] * shape[2] if shape[1] == shape[2] else shape[2] * shape[3]
