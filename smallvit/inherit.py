"""What a configuration leaves open and the trained weights that it begins with decide. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from smallvit import headers, trained
from smallvit.config import Config
from smallvit.options import PLUGINS, ModelConfig, flag
from smallvit.trained import Card

ARCH = "vit"
"""The architecture where none is named."""
ALIASES = {"vit96": "vit"}
"""Architectures that another name stands for at some image sizes."""
ADDED = (*PLUGINS, "dist_token")
ANEW = ("dropout", "drop_path", "rising_drop_path")
"""Options of the model that weights do not decide."""


def inherited(config: Config, given: Collection[str] | None = None) -> Config:
    """The configuration with its model complete: architecture, plugins, patches and image size are those of --init.

    Plugins that --init has not are added to it. Where all is said already, nothing changes. `given` names the options
    that were set on purpose; without it, those that differ from the defaults count.

    Raises:
        InputError: no such weights, or options that contradict them.
    """
    name = config.init.init
    card = None if name is None else trained.card(name, "--init")
    if card is None:
        return config if config.model.arch is not None else config.replace(arch=ARCH)
    if card.spec is None:  # of a bare file, tensors alone tell
        sizes = headers.sizes(card.path, config.model.patch_size)
        patch = config.model.patch_size or sizes.get("patch_size")
        size = config.data.img_size or sizes.get("img_size")
        return config.replace(arch=config.model.arch or ARCH, patch_size=patch, img_size=size)
    model = _model(config.model, card, given)
    closed = {"diagonal_until": 0.0} if card.spec.get("lsa") and model["plugin_init"] == "exact" else {}
    return config.replace(img_size=config.data.img_size or card.spec["img_size"], **model, **closed)


def _model(wanted: ModelConfig, card: Card, given: Collection[str] | None) -> dict[str, Any]:
    """The model's options: those of the weights, and what is added to them."""
    has = {field.name: card.spec.get(field.name, field.default) for field in fields(ModelConfig)}
    asked = {field.name: getattr(wanted, field.name) for field in fields(ModelConfig)}
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    on_purpose = given if given is not None else {name for name in asked if asked[name] != defaults[name]}
    added = [plugin for plugin in ADDED if asked[plugin] and not has[plugin]]
    old = has["spt"] or has["lsa"]
    options = has | {name: asked[name] for name in (*ANEW, *added)}
    for name in asked.keys() - {*ANEW, *added}:
        new = name == "plugin_init" and not old
        if new or name.partition("_")[0] in added or (name == "dist_average" and "dist_token" in added):
            options[name] = asked[name]
        elif name in on_purpose and asked[name] not in (has[name], ALIASES.get(has[name]), None):
            if name == "plugin_init" and not {"spt", "lsa"} & {*added}:
                continue  # it has nothing to act on
            raise card.error(f"has {_spelt(name, has[name])}, not {_spelt(name, asked[name])}; leave it out")
    if has["arch"] == ARCH:
        options["fit"] = False  # it would be another one for the smallest images
    return options


def _spelt(name: str, value: object) -> str:
    """An option as the command line has it."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"
