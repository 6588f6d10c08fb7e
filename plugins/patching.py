"""Putting the plugins into a model and taking them out again.

Attention layers and binary ones change their class in place. Where SPT keeps trained weights, so do convolutions and
mergings; as published, it is a new layer in their place, and what stood there waits in an attribute of it,
unregistered: absent from `parameters()` and `state_dict()`, present in copies and pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from smallvit.plugins import binary_timm, lsa_timm, spt_timm
from smallvit.plugins.binary import Binary, BinaryConfig
from smallvit.plugins.binary_packed import Packed
from smallvit.plugins.locality import Locality
from smallvit.plugins.lsa import LSAConfig
from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_exact import ShiftedViews

TITLES = {"spt": "shifted patch tokenization", "lsa": "locality self-attention", "binary": "one-bit layers"}


ORIGINAL = "_smallvit_original"
"""Attribute of a layer that SPT put into a model: what stood in its place."""


class UnsupportedModelError(TypeError):
    """A model has no layer that the plugin can take; the line says why."""


@dataclass(frozen=True)
class Site:
    """A layer that a plugin is meant for."""

    plugin: Literal["spt", "lsa", "binary"]
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
    binary: bool | BinaryConfig = False,
    init: Literal["paper", "exact"] = "paper",
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Put SPT, LSA and one-bit layers into a timm model, in place, and return it; one of them, or several.

    What is patched already stays as it is, so patching twice changes nothing. Attention layers keep their weights
    and begin at their own scale; binary layers keep theirs too, and use their signs. Binary layers come last: give SPT
    and LSA in the same call, or before.

    `init="paper"`: as published; SPT's weights are new, and tokens cease to attend to themselves at once.
    `init="exact"`: a trained model's outputs stay what they were. SPT's shifted views are added with zero weights
    and without a norm, and the attention's diagonal stays open until `set_openness` closes it.

    `include` and `exclude` are patterns of layer names (`blocks.[0-5].attn`, `*.downsample`), one or several.

    Raises:
        UnsupportedModelError: the model has no layer that the plugin can take. It is then unchanged.
        TypeError: a plugin is asked for by something other than a bool or its config.
        ValueError: no plugin was asked for, or the patterns leave no layer.
    """
    if init not in ("paper", "exact"):
        raise ValueError(f"init {init!r}: expected paper or exact")
    variants = {
        "spt": _variant(spt, SPTConfig, "spt"),
        "lsa": _variant(lsa, LSAConfig, "lsa"),
        "binary": _variant(binary, BinaryConfig, "binary"),
    }
    wanted = {plugin: variant for plugin, variant in variants.items() if variant is not None}
    if not wanted:
        raise ValueError("choose what to patch: spt=True, lsa=True, binary=True, or several of them")
    patterns = _Patterns(_tuple(include), _tuple(exclude))
    for plugin, variant in wanted.items():
        _chosen(model, plugin, variant, patterns, init)  # or an error, before anything has changed
    for plugin, variant in wanted.items():
        for site in _chosen(model, plugin, variant, patterns, init):
            if plugin == "spt":
                _tokenize(model, site, variant, init)
            elif plugin == "binary":
                binary_timm.binarise(site.layer, variant)
            else:
                Locality.adapters[type(site.layer)].adopt(site.layer, variant, gradual=init == "exact")
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Make a patched model timm's own again, in place, and return it; a plain model stays as it is.

    Weights keep what they learnt while patched: those of binary layers, all of the attention's but the temperatures,
    and with init="exact" those of embeddings and mergings. Layers that SPT replaced as published come back with their
    weights of that time, since SPT's do not fit into them.
    """
    layers = [layer for _, _, layer in patched_layers(model)]
    for layer in layers:
        if (before := original(layer)) is not None and _on_meta(before) and not _on_meta(model):
            raise ValueError(f"{type(before).__name__} was patched before it had weights: there are none to go back to")
    for layer in sorted(layers, key=lambda layer: not isinstance(layer, Packed)):  # those that cannot, before others do
        if isinstance(layer, Binary):
            layer.release()
    for layer in layers:
        if isinstance(layer, Locality | ShiftedViews):
            layer.release()
            _allow_other_patches(model, layer)
    for layer in layers:
        if (before := original(layer)) is not None:
            _restore(model, layer, before)
    return model


def patched_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(plugin, qualified name, layer) of every layer that `patch` changed."""
    for name, module in model.named_modules():
        if isinstance(module, ShiftedViews) or original(module) is not None:
            yield "spt", name, module
    for name, module in model.named_modules():
        if isinstance(module, Locality):
            yield "lsa", name, module
    for name, module in model.named_modules():
        if isinstance(module, Binary):
            yield "binary", name, module


def original(layer: nn.Module) -> nn.Module | None:
    """What stood in the place of a layer that SPT put there; None for other layers."""
    return vars(layer).get(ORIGINAL)


def sites(model: nn.Module) -> Iterator[Site]:
    """Every layer of a model that a plugin is meant for and has not taken yet, whether it can or not."""
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
    for name, layer, reason in binary_timm.places(model):
        yield Site("binary", name, layer, layer, reason)


def why_not(model: nn.Module, plugin: str) -> str | None:
    """Why a plugin can take none of a model's layers; None where it can, or has."""
    found = [site for site in sites(model) if site.plugin == plugin]
    if any(site.refusal is None and not _is_class_attention(site.layer) for site in found):
        return None
    done = {key for key, _, _ in patched_layers(model)}
    if plugin in done:
        return None
    if plugin == "lsa" and "binary" in done:
        return "its attention is binary already; give lsa in the same call as binary, or before"
    if found:
        reasons = {f"{type(site.layer).__name__} ({site.refusal or lsa_timm.CLASS_ATTENTION})": None for site in found}
        return "none of its layers fits: " + ", ".join(reasons)
    return {
        "spt": "it has no embedding or merging of patches that SPT knows",
        "lsa": "it has no layer that attends by a softmax over tokens",
        "binary": "it has no blocks of attention and linear layers that are known",
    }[plugin]


def _variant(wanted: Any, kind: type, plugin: str) -> Any:
    """The variant of a plugin that is asked for; None where it is not."""
    if isinstance(wanted, bool):
        return kind() if wanted else None
    if not isinstance(wanted, kind):
        raise TypeError(f"{plugin}={wanted!r}: expected True, False or a {kind.__name__}")
    return wanted


def _chosen(model: nn.Module, plugin: str, variant: Any, patterns: _Patterns, init: str) -> list[Site]:
    """The layers that a plugin shall take now."""
    cannot = f"cannot patch this {type(model).__name__} with {TITLES[plugin]}"
    if (reason := why_not(model, plugin)) is not None:
        raise UnsupportedModelError(f"{cannot}: {reason}")
    meant = [site for site in sites(model) if site.plugin == plugin]
    if plugin == "binary":
        meant = [site for site in meant if binary_timm.wanted(site.name, site.layer, variant)]
    fit = [site for site in meant if site.refusal is None]
    chosen = [site for site in fit if patterns.match(site.name)]
    done = any(key == plugin and patterns.match(name) for key, name, _ in patched_layers(model))
    refused = [site for site in meant if site.refusal is not None and patterns.match(site.name)]
    if plugin == "binary" and refused:
        site = refused[0]
        raise UnsupportedModelError(
            f"{cannot}: {site.name}: {type(site.layer).__name__}: {site.refusal}; leave it in full precision "
            "(attention=False, --no-binary-attention)"
        )
    if not chosen and not done:
        names = ", ".join(site.name for site in fit[:3]) + (", ..." if len(fit) > 3 else "")
        raise ValueError(f"{patterns} leave no layer for {TITLES[plugin]}; there are {names}")
    if plugin == "binary":
        return chosen
    if plugin == "lsa":
        changing = [site for site in chosen if Locality.adapters[type(site.layer)].changes(variant)]
        if not changing and not done:
            raise UnsupportedModelError(f"{cannot}: {variant} leaves nothing of it in these layers")
        return changing
    for site in chosen:
        kind = type(site.layer).__name__
        if init == "exact" and spt_timm.with_shifted_views(site.layer) is None:
            raise UnsupportedModelError(f"{site.name}: {kind} normalises all views together; use init='paper'")
        if init == "paper" and site.within is model and site.layer is model:
            raise UnsupportedModelError(f"{cannot}: it would be replaced; patch the model that it is part of")
    return chosen


def _tokenize(model: nn.Module, site: Site, config: SPTConfig, init: str) -> None:
    """Put SPT into one place."""
    if init == "exact":
        spt_timm.with_shifted_views(site.layer).adopt(site.layer, config)
    else:
        for name, new in spt_timm.published(site.layer, site.within, config).items():
            old = site.within.get_submodule(name)
            object.__setattr__(new, ORIGINAL, old)  # beside the registry: no submodule
            _replace(model, old, new)
    if hasattr(site.within, "set_input_size"):
        object.__setattr__(site.within, "set_input_size", spt_timm.KeepPatchSize(site.within))


def _restore(model: nn.Module, layer: nn.Module, before: nn.Module) -> None:
    """Put back what stood in a layer's place, where and as the layer is now."""
    parameters = list(layer.parameters())
    like = next(iter(parameters), next(model.parameters(), None))
    before.to(like.device, like.dtype).train(layer.training)
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        before.requires_grad_(False)
    for module in [*before.modules()]:
        if isinstance(module, Binary):  # of a merging that SPT took the place of
            module.release()
    _replace(model, layer, before)
    _allow_other_patches(model, before)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module into every place where another is."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def _allow_other_patches(model: nn.Module, layer: nn.Module) -> None:
    """Give the embedding that holds a layer its own `set_input_size` back."""
    for parent in model.modules():
        if isinstance(vars(parent).get("set_input_size"), spt_timm.KeepPatchSize) and layer in parent.children():
            del parent.set_input_size


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


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
