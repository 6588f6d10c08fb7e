"""What `smallvit profile` measures: a model by its row, or a run's, at any image size that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from smallvit import models, trained
from smallvit.comparison import rows
from smallvit.config import Config
from smallvit.costs import bits, growth
from smallvit.costs.memory import bounded
from smallvit.errors import InputError, first_line
from smallvit.options import ModelConfig
from smallvit.plugins import set_input_size
from smallvit.profile import count_parameters, macs_by_layer

IN_CHANS = 3
"""Of models that no run says more of."""
OF_MODELS = {option.name for option in fields(ModelConfig)}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A row of a profile. Costs do not depend on weights, so none are loaded."""

    label: str
    spec: dict[str, Any]
    """Arguments of `create_model`; a run's have its image size among them."""

    @property
    def own_size(self) -> int | None:
        """The image size that it was trained at."""
        return self.spec.get("img_size")

    def made_for(self, img_size: int) -> dict[str, Any]:
        """Arguments of `create_model`, with patches fit for this image size; a run's keep theirs."""
        if self.own_size is not None:
            return self.spec
        arch, fit = self.spec["arch"], self.spec["fit"]
        return self.spec | {
            "img_size": img_size,
            "arch": models.resolved(arch, img_size, fit=fit),
            "patch_size": self.spec["patch_size"] or models.patch_for(arch, img_size, fit=fit),
        }

    def at(self, img_size: int, spec: dict[str, Any] | None = None) -> Case:
        """It at an image size, as made for it, or as `spec` has it.

        Raises:
            InputError: it takes no such images; the line names the row.
        """
        with self._named():
            spec = spec or self.made_for(img_size)
            with bounded(torch.device("cpu")):
                counts = counted(built(spec, img_size), spec["in_chans"], img_size)
            return Case(label=self.label, spec=spec, img_size=img_size, counts=counts)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"row {self.label}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row at one image size."""

    label: str
    spec: dict[str, Any]
    """Arguments of `create_model`, for the size that it is made for."""
    img_size: int
    """Of the images that it is given."""
    counts: dict[str, float | None]
    """What `counted` found."""

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.spec["in_chans"]

    def build(self) -> nn.Module:
        """The model."""
        return built(self.spec, self.img_size)


def built(spec: dict[str, Any], img_size: int) -> nn.Module:
    """The model of arguments of `create_model`; at another size than theirs, with the same patches and windows.

    Raises:
        InputError: it takes no such images.
    """
    same = models.resolved(spec["arch"], img_size, fit=spec["fit"]) == spec["arch"]
    if img_size == spec["img_size"] or (spec["patch_size"] is not None and same):
        return models.create_model(**spec | {"img_size": img_size})
    model = models.create_model(**spec)
    try:
        return set_input_size(model, img_size) if hasattr(model, "set_input_size") else model  # convolutions take any
    except Exception as error:  # whatever a thousand models raise at sizes not foreseen
        raise InputError(f"{spec['arch']} cannot take {img_size}-pixel images ({first_line(error)})") from None


def counted(model: nn.Module, in_chans: int, img_size: int) -> dict[str, float | None]:
    """Parameters, tokens, operations of the model and of its attention, and bytes; None for what it has none of.

    Tokens are those of the first layer that attends.

    Raises:
        InputError: the model takes no such images.
    """
    macs, scores = macs_by_layer(model, in_chans, img_size), growth.scores(model, img_size)
    operations = bits.operations(model, macs)
    return {
        "tokens": scores[0].tokens if scores else None,
        "parameters": count_parameters(model),
        "macs": operations.macs,
        "bops": operations.bops,
        "flops": operations.flops,
        "ops": operations.ops,
        "packed_bytes": bits.packed_bytes(model),
        "float_bytes": bits.float_bytes(model),
        "attention_macs": growth.measured(model, macs),
        "attention_macs_formula": growth.formula(model, img_size),
    }


def subject(text: str, num_classes: int) -> Subject:
    """A row from its text, ARCH[+spt][+lsa][+binary][,option=value]..., or a run's folder.

    Raises:
        InputError: no such model or run, or an option that no cost depends on.
    """
    if trained.is_path(text):
        card = trained.card(text, "profile")
        if card.spec is None:
            raise card.error("another program's file, which does not say what model it holds; give the model's name")
        return Subject(label=text, spec=card.spec)
    row = rows.parse(text)
    with row.named():
        stray = [*(name for name in row.options if name not in OF_MODELS), *(["recipe"] if row.recipe else [])]
        if stray:
            raise InputError(f"{stray[0]} is no option of a model, and changes nothing that is measured; leave it out")
        config = Config.build(**row.given({}, None)).model
        models.require_known(config.arch)
    return Subject(label=row.label, spec=asdict(config) | {"in_chans": IN_CHANS, "num_classes": num_classes})


def subjects(texts: list[str], num_classes: int) -> list[Subject]:
    """Rows from their texts.

    Raises:
        InputError: one of them cannot be, or is there twice.
    """
    found = [subject(text, num_classes) for text in texts]
    labels = [each.label for each in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"row {twice[0]} is there twice")
    return found
