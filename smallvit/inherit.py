"""What a configuration leaves open and the trained weights that it begins with decide. Needs no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from smallvit import trained
from smallvit.config import Config
from smallvit.options import ModelConfig, flag
from smallvit.trained import Card

ARCH = "vit"
"""The architecture where none is named."""
ALIASES = {"vit96": "vit"}
"""Architectures that another name stands for at some image sizes."""


def inherited(config: Config) -> Config:
    """The configuration with its model complete: architecture, plugins, patches and image size are those of --init.

    Plugins that --init has not are added to it. Where all is said already, nothing changes.

    Raises:
        InputError: no such weights, or options that contradict them.
    """
    if config.distill.distill == "token":
        config = config.replace(dist_token=True)
    name = config.init.init
    if name is None:
        return config if config.model.arch is not None else config.replace(arch=ARCH)
    card = trained.card(name, "--init")
    if card.spec is None:
        return config if config.model.arch is not None else config.replace(arch=ARCH)
    model = _model(config.model, card)
    closed = {"diagonal_until": 0.0} if card.spec.get("lsa") and model["plugin_init"] == "exact" else {}
    size = config.data.img_size or card.spec["img_size"]
    return config.replace(init=trained.absolute(name), img_size=size, **model, **closed)


def _model(wanted: ModelConfig, card: Card) -> dict[str, Any]:
    """The model's options: those of the weights, and what is added to them."""
    has = {field.name: card.spec.get(field.name, field.default) for field in fields(ModelConfig)}
    plugins = {plugin: getattr(wanted, plugin) or has[plugin] for plugin in ("spt", "lsa", "dist_token")}
    added = [plugin for plugin in ("spt", "lsa") if plugins[plugin] and not has[plugin]]
    options = {name: getattr(wanted, name) for name in ("dropout", "drop_path", "dist_average")} | plugins
    options["fit"] = has["fit"] and has["arch"] != ARCH  # which is another one for the smallest images
    for field in fields(ModelConfig):
        name, asked = field.name, getattr(wanted, field.name)
        if name in options:
            continue
        if name.partition("_")[0] in added or (name == "plugin_init" and not (has["spt"] or has["lsa"])):
            options[name] = asked  # of a plugin that is new
            continue
        if asked not in (field.default, has[name], ALIASES.get(has[name])) and (name != "plugin_init" or added):
            raise card.error(f"has {flag(name)} {has[name]}, not {asked}; leave it out")
        options[name] = has[name]
    return options
