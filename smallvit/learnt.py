"""The data that a trained model brings: what its run learnt from, where it has one. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from smallvit import trained
from smallvit.errors import InputError
from smallvit.options import DATA_NAMES, DataConfig
from smallvit.runs import Run, read_options
from smallvit.trained import Card

APART = ("img_size",)
"""Options of the data that trained weights decide themselves."""


def learnt_data(name: str) -> dict[str, Any] | None:
    """The data options of the run that trained weights are of, given as its folder or a file in it; None without a run.

    The image size is left to the weights.

    Raises:
        InputError: the run's configuration is damaged.
    """
    if not trained.is_path(name):
        return None
    place = Path(os.path.expanduser(name))
    file = (place if os.path.isdir(place) else place.parent) / Run.CONFIG
    if not os.path.exists(file):
        return None
    try:
        options = read_options(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error.strerror if isinstance(error, OSError) else error}") from None
    return {option.name: options[option.name] for option in fields(DataConfig) if option.name in options.keys() - APART}


def with_learnt_data(card: Card, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, on top of the data of the model's own run where they name none.

    Raises:
        InputError: they name none, and the model is of no run.
    """
    if "data" in options:
        return dict(options)
    if (learnt := learnt_data(card.name)) is None:
        raise card.error("not the folder of a run, so nothing says which data is meant; give --data")
    return learnt | options


def is_learnt(data: str, learnt: Mapping[str, Any] | None) -> bool:
    """Whether --data names what a run has learnt from."""
    path = os.path.expanduser(data)
    named = data in DATA_NAMES or not os.path.exists(path)
    return learnt is not None and learnt.get("data") == (data if named else os.path.realpath(path))


def weights_sha256(card: Card) -> str | None:
    """What tells weights from others; None for timm's, whose name does."""
    if card.path is None:
        return None
    with open(card.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
