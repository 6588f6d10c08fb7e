"""Putting the plugins into a model and taking them out again.

Attention layers change their class in place. Where SPT keeps trained weights, so do convolutions and mergings; as
published, it is a new layer in their place, and what stood there waits in its attribute `original`, unregistered:
absent from `parameters()` and `state_dict()`, present in copies and pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from smallvit.plugins import lsa_timm, spt_timm
from smallvit.plugins.lsa import Locality, LSAConfig
from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_exact import ShiftedViews

TITLES = {"spt": "shifted patch tokenization", "lsa": "locality self-attention"}


class UnsupportedModelError(TypeError):
    """A model has no layer that the plugin can take; the line says why."""


@dataclass(frozen=True)
class Site:
    """A layer that a plugin is meant for."""

    plugin: Literal["spt", "lsa"]
    name: str
    """Qualified, in the model."""
    layer: nn.Module
    within: nn.Module
    """The module that it serves: the embedding of a convolution, else the layer itself."""
    refusal: str | None
    """Why the plugin cannot take it, if it cannot."""


def patch(
    model: nn.Module,
    *,
    spt: bool | SPTConfig = False,
    lsa: bool | LSAConfig = False,
    init: Literal["paper", "exact"] = "paper",
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Put SPT and/or LSA into a timm model, in place, and return it.

    What is patched already stays as it is, so patching twice changes nothing. Attention layers keep their weights
    and begin at their own scale.

    `init="paper"`: as published; SPT's weights are new, and tokens cease to attend to themselves at once.
    `init="exact"`: a trained model's outputs stay what they were. SPT's shifted views are added with zero weights
    and without a norm, and the attention's diagonal stays open until `set_openness` closes it.

    `include` and `exclude` are patterns of layer names (`blocks.[0-5].attn`, `*.downsample`), one or several.

    Raises:
        UnsupportedModelError: the model has no layer that the plugin can take. It is then unchanged.
        ValueError: neither plugin was asked for, or the patterns leave no layer.
    """
    if init not in ("paper", "exact"):
        raise ValueError(f"init {init!r}: expected paper or exact")
    configs = {"spt": spt, "lsa": lsa}
    if not any(configs.values()):
        raise ValueError("choose what to patch: spt=True, lsa=True or both")
    patterns = _Patterns(_tuple(include), _tuple(exclude))
    for plugin, config in configs.items():
        if config:
            _chosen(model, plugin, patterns, init)  # or an error, before anything has changed
    if spt:
        config = spt if isinstance(spt, SPTConfig) else SPTConfig()
        for site in _chosen(model, "spt", patterns, init):
            _tokenize(model, site, config, init)
    if lsa:
        config = lsa if isinstance(lsa, LSAConfig) else LSAConfig()
        for site in _chosen(model, "lsa", patterns, init):
            Locality.adapters[type(site.layer)].adopt(site.layer, config, gradual=init == "exact")
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Make a patched model timm's own again, in place, and return it; a plain model stays as it is.

    Weights keep what they learnt while patched: all of the attention's but the temperatures, and with
    init="exact" those of embeddings and mergings. Layers that SPT replaced as published come back with their
    weights of that time, since SPT's do not fit into them.
    """
    like = next(model.parameters())
    for _, name, layer in list(patched_layers(model)):
        if isinstance(layer, Locality | ShiftedViews):
            layer.release()
        else:
            model.set_submodule(name, original(layer).to(like.device, like.dtype).train(layer.training))
    return model


def patched_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(plugin, qualified name, layer) of every layer that `patch` changed."""
    for name, module in model.named_modules():
        if isinstance(module, ShiftedViews) or original(module) is not None:
            yield "spt", name, module
    for name, module in model.named_modules():
        if isinstance(module, Locality):
            yield "lsa", name, module


def original(layer: nn.Module) -> nn.Module | None:
    """What stood in the place of a layer that SPT put there; None for other layers."""
    return vars(layer).get("original")


def sites(model: nn.Module) -> Iterator[Site]:
    """Every layer of a model that SPT or LSA is meant for and has not taken yet, whether it can or not."""
    for name, layer, within in spt_timm.places(model):
        if not isinstance(layer, ShiftedViews) and all(original(leaf) is None for leaf in within.modules()):
            yield Site("spt", name, layer, within, spt_timm.refusal(layer))
    for name, module in model.named_modules():
        if (reason := spt_timm.REASONS.get(type(module))) is not None:
            yield Site("spt", name, module, module, reason)
        if (adapter := Locality.adapters.get(type(module))) is not None:
            yield Site("lsa", name, module, module, adapter.refusal(module))
        elif (reason := lsa_timm.REASONS.get(type(module))) is not None:
            yield Site("lsa", name, module, module, reason)


def why_not(model: nn.Module, plugin: str) -> str | None:
    """Why a plugin can take none of a model's layers; None where it can, or has."""
    found = [site for site in sites(model) if site.plugin == plugin]
    if any(site.refusal is None and not _is_class_attention(site.layer) for site in found):
        return None
    if any(key == plugin for key, _, _ in patched_layers(model)):
        return None
    if found:
        reasons = {f"{type(site.layer).__name__} ({site.refusal or lsa_timm.CLASS_ATTENTION})": None for site in found}
        return "none of its layers fits: " + ", ".join(reasons)
    return {
        "spt": "it has no embedding or merging of patches that SPT knows",
        "lsa": "it has no layer that attends by a softmax over tokens",
    }[plugin]


def _chosen(model: nn.Module, plugin: str, patterns: _Patterns, init: str) -> list[Site]:
    if (reason := why_not(model, plugin)) is not None:
        raise UnsupportedModelError(f"cannot patch this {type(model).__name__} with {TITLES[plugin]}: {reason}")
    fit = [site for site in sites(model) if site.plugin == plugin and site.refusal is None]
    chosen = [site for site in fit if patterns.match(site.name)]
    if not chosen and not any(key == plugin and patterns.match(name) for key, name, _ in patched_layers(model)):
        names = ", ".join(site.name for site in fit[:3]) + (", ..." if len(fit) > 3 else "")
        raise ValueError(f"{patterns} leave no layer for {TITLES[plugin]}; there are {names}")
    for site in chosen:
        if plugin == "spt" and init == "exact" and spt_timm.with_shifted_views(site.layer) is None:
            kind = type(site.layer).__name__
            raise UnsupportedModelError(f"{site.name}: {kind} normalises all views together; use init='paper'")
    return chosen


def _tokenize(model: nn.Module, site: Site, config: SPTConfig, init: str) -> None:
    """Put SPT into one place."""
    if init == "exact":
        spt_timm.with_shifted_views(site.layer).adopt(site.layer, config)
        return
    prefix = next(name for name, module in model.named_modules() if module is site.within)
    for name, new in spt_timm.published(site.layer, site.within, config).items():
        qualified = ".".join(filter(None, (prefix, name)))
        object.__setattr__(new, "original", model.get_submodule(qualified))  # beside the registry: no submodule
        model.set_submodule(qualified, new)


def _is_class_attention(layer: nn.Module) -> bool:
    """Whether LSA would only give a layer temperatures, which is none on its own."""
    adapter = Locality.adapters.get(type(layer))
    return adapter is not None and not adapter.has_diagonal


@dataclass(frozen=True)
class _Patterns:
    """Which layers are meant, by their names."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def match(self, name: str) -> bool:
        return any(fnmatchcase(name, p) for p in self.include) and not any(fnmatchcase(name, p) for p in self.exclude)

    def __str__(self) -> str:
        return f"include={list(self.include)}, exclude={list(self.exclude)}"


def _tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
