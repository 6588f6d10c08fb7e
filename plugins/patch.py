"""Patch plugins into a model, remove them, describe what is patched, and load weights of the model without them."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from smallvit.plugins import PLUGINS
from smallvit.plugins.base import Init, Plugin, PluginConfig, Site, original

MINOR = "it has one query, the class token"
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Entries of a checkpoint that hold weights, in the order in which timm looks for them."""


class UnsupportedModelError(TypeError):
    """A model has no layer that a plugin can change."""


def patch(
    model: nn.Module,
    *,
    init: Init = "paper",
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    **plugins: bool | PluginConfig,
) -> nn.Module:
    """Patch plugins into a timm model, in place, and return it.

    Layers that are patched already stay unchanged, so patching twice has no effect. Plugins are applied in the order
    of `PLUGINS`: pass those that are to be combined in one call. If it raises, the model is unchanged.

    Create the optimizer afterwards: one that exists already does not train the new parameters, and a `UserWarning` says
    so.

    Args:
        init: "paper": new parameters start as published. "preserve": the outputs of a trained model do not change
            at first. The weights of SPT's shifted views start at zero, without a norm, and tokens attend to themselves
            until `set_lsa_strength` masks the diagonal.
        include: one or several patterns of layer names to patch, such as `blocks.[0-5].attn` or `*.downsample`.
        exclude: one or several patterns of layer names to skip.
        plugins: True, or a configuration, by plugin: `spt=True, lsa=LSAConfig(mask=False)`.

    Raises:
        UnsupportedModelError: the model has no layer that a plugin can change, or a layer has its own `forward`.
        TypeError: an unknown plugin, or a value that is neither a bool nor its configuration.
        ValueError: no plugin is given, two exclude each other, or the patterns match no layer.
    """
    if init not in ("paper", "preserve"):
        raise ValueError(f"init {init!r}: expected paper or preserve")
    configs = {name: config for name in PLUGINS if (config := _config(name, plugins.pop(name, False))) is not None}
    if plugins:
        raise TypeError(f"{next(iter(plugins))}: no such plugin; expected one of {', '.join(PLUGINS)}")
    if not configs:
        raise ValueError("no plugin is given; expected " + ", ".join(f"{name}=True" for name in PLUGINS))
    for name in configs:
        for other in PLUGINS[name].excludes:
            if other in configs or any(plugin == other for plugin, _, _ in patched_layers(model)):
                raise ValueError(f"{PLUGINS[name].title} cannot be combined with {PLUGINS[other].title}; remove one")
    include, exclude = ([each] if isinstance(each, str) else list(each) for each in (include, exclude))
    for name, config in configs.items():
        _select(model, PLUGINS[name], config, init, include, exclude)  # raises before anything has changed
    before = list(model.parameters())
    has_optimizer = _have_optimizer(before)
    kept = {(plugin, layer) for plugin, _, layer in patched_layers(model)}
    try:
        for name, config in configs.items():
            for site in _select(model, PLUGINS[name], config, init, include, exclude, together=configs):
                PLUGINS[name].apply(model, site, config, init)
    except Exception:  # plugins may leave each other no layer
        _remove(model, kept)
        raise
    known = set(map(id, before))
    if has_optimizer and (new := [name for name, each in model.named_parameters() if id(each) not in known]):
        warnings.warn(
            f"an optimizer of this {type(model).__name__} was created before patching and does not train its "
            f"{len(new)} new parameters ({_first(new)}); create the optimizer after patching",
            stacklevel=2,
        )
    return model


def unpatch(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Remove all plugins from a model, in place, and return it; a model without plugins stays unchanged.

    Layers keep the weights that they learned while patched, and queries are multiplied by what LSA's temperatures
    learned. Layers that a plugin replaced return with the weights from before, since the new ones do not fit them. If
    the outputs change, a `UserWarning` names what is lost.

    Args:
        strict: raise instead of warning, and leave the model unchanged.

    Raises:
        ValueError: a layer has its own `forward`, is packed, or was patched before it had weights; or, if `strict`, the
            outputs would change.
    """
    lost: dict[str, list[str]] = {}
    for plugin, name, layer in patched_layers(model):
        if (reason := own_forward(name, layer)) is not None:
            raise ValueError(f"cannot unpatch this {type(model).__name__}: {reason}, then unpatch")
        if (reason := getattr(layer, "irreversible", None)) is not None:
            raise ValueError(f"cannot unpatch this {type(model).__name__}: {name}: {reason}")
        if (old := original(layer)) is not None and _is_on_meta(old) and not _is_on_meta(model):
            raise ValueError(f"{type(old).__name__} was patched before it had weights: there are none to restore")
        if not _is_on_meta(model) and (loss := PLUGINS[plugin].describe_loss(layer)) is not None:
            lost.setdefault(loss, []).append(name)
    if lost:
        losses = "; ".join(f"{loss}, in {_first(names)}" for loss, names in lost.items())
        message = (
            f"unpatching changes the outputs of this {type(model).__name__}. It loses {losses}. "
            f"Keep it patched, or train it again afterwards"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    _remove(model)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a trained model for fast inference: the same outputs up to rounding, from fewer operations.

    LSA's temperatures are folded into the queries and its mask is kept; SPT's norm and projection are folded. Layers
    whose weights may not be read (hooked, quantized, one-bit) and other plugins stay unchanged. The copy's weights are
    frozen, it cannot be trained or unpatched, and its state dict is not the model's: save the model itself. Later
    changes of the model have no effect on it; fuse again.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for plugin, _, layer in list(patched_layers(fused)):
        PLUGINS[plugin].fuse(fused, layer)
    object.__setattr__(fused, "train", partial(_refuse_training, fused))
    return fused


def _refuse_training(fused: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise RuntimeError(f"this {type(fused).__name__} is fused for inference; train the model that fuse copied")
    return type(fused).train(fused, False)


def _remove(model: nn.Module, kept: Collection[tuple[str, nn.Module]] = ()) -> None:
    """Remove plugins from all layers except those `kept`."""
    while patched := [(plugin, layer) for plugin, _, layer in patched_layers(model) if (plugin, layer) not in kept]:
        for plugin, layer in reversed(patched):  # and then of layers within a restored one
            PLUGINS[plugin].remove(model, layer)


def patched_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield plugin, qualified name and module of every layer that `patch` changed."""
    for plugin in PLUGINS.values():
        yield from ((plugin.name, name, layer) for name, layer in plugin.patched(model))


def unsupported_reason(
    model: nn.Module, plugin: str, sites: Sequence[Site] | None = None, together: Collection[str] = ()
) -> str | None:
    """Return why a plugin can change none of a model's layers, by default all its sites; None if it can, or has."""
    sites = list(PLUGINS[plugin].sites(model)) if sites is None else sites
    done = {name for name, _, _ in patched_layers(model)}
    if plugin in done or any(site.reason is None and not site.minor for site in sites):
        return None
    if sites:
        reasons = (f"{type(site.layer).__name__} ({site.reason or MINOR})" for site in sites)
        return "none of its layers fits: " + ", ".join(dict.fromkeys(reasons))
    if done:
        advice = "" if done <= set(together) else "; give all plugins in the same call"
        return f"no layer is left for it after {', '.join(sorted(done))}{advice}"
    return "it has no layer of a known kind"


def _config(name: str, value: bool | PluginConfig) -> PluginConfig | None:
    """Return the configuration of a plugin; None if it is off."""
    kind = PLUGINS[name].config
    if isinstance(value, bool):
        return kind() if value else None
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: expected True, False or a {kind.__name__}")
    return value


def _select(
    model: nn.Module,
    plugin: Plugin,
    config: PluginConfig,
    init: Init,
    include: list[str],
    exclude: list[str],
    together: Collection[str] = (),
) -> list[Site]:
    """Return the sites that a plugin changes now, `together` with others of the same call.

    Raises:
        UnsupportedModelError, ValueError: as of `patch`.
    """

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, each) for each in include) and not any(fnmatchcase(name, each) for each in exclude)

    cannot = f"cannot patch this {type(model).__name__} with {plugin.title}"
    sites = list(plugin.sites(model, config, init))
    if (reason := unsupported_reason(model, plugin.name, sites, together)) is not None:
        raise UnsupportedModelError(f"{cannot}: {reason}")
    matched = [site for site in sites if matches(site.name)]
    chosen = [site for site in matched if site.reason is None]
    if plugin.strict and len(chosen) < len(matched):
        site = next(site for site in matched if site.reason is not None)
        raise UnsupportedModelError(
            f"{cannot}: {site.name}: {type(site.layer).__name__}: {site.reason}; exclude it, or switch off that option"
        )
    if reason := next(filter(None, (own_forward(site.name, site.layer) for site in chosen)), None):
        raise UnsupportedModelError(f"{cannot}: {reason} or exclude the layer, then patch")
    if not chosen and not any(matches(name) for name, _ in plugin.patched(model)):
        names = [site.name for site in sites if site.reason is None]
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{include=}, {exclude=} match no layer for {plugin.title}; expected a pattern of {listed}")
    return chosen


def own_forward(name: str, layer: nn.Module) -> str | None:
    """Return why a layer's class cannot change: a `forward` set on the instance would run instead of the class's."""
    if "forward" not in vars(layer):
        return None
    return (
        f"{name}: this {type(layer).__name__} instance has its own forward, which would run instead (accelerate sets "
        f"one); remove it (del layer.forward)"
    )


def _have_optimizer(parameters: list[nn.Parameter]) -> bool:
    """Return whether an optimizer holds any of a model's parameters.

    Parameters do not refer to it, so all objects are searched, in about 0.1 s. This is skipped if nothing but the list
    and one module refers to each parameter.
    """
    (alone,) = map(sys.getrefcount, [nn.Parameter(torch.empty(0))])
    if all(count <= alone + 1 for count in map(sys.getrefcount, parameters)):
        return False
    ids = set(map(id, parameters))
    optimizers = (each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer))
    groups = (group for each in optimizers for group in getattr(each, "param_groups", ()))
    return any(id(parameter) in ids for group in groups for parameter in group["params"])


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _is_on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


@dataclass(frozen=True)
class Change:
    """A changed layer: the plugin, the layer's name in the model, how many parameters it gained."""

    plugin: str
    name: str
    added_parameters: int
    detail: str


@dataclass(frozen=True)
class Description:
    """The changed layers of a model and their cost in parameters; `print` it."""

    model: str
    parameters: int
    changes: tuple[Change, ...]

    @property
    def added_parameters(self) -> int:
        """Number of parameters added by the plugins."""
        return sum(change.added_parameters for change in self.changes)

    def __str__(self) -> str:
        before = self.parameters - self.added_parameters
        lines = [f"{self.model}: {self.parameters:,} parameters, {before:,} without plugins"]
        patched = {change.plugin for change in self.changes}
        for plugin in (PLUGINS[name] for name in PLUGINS if name in patched):
            changes = [change for change in self.changes if change.plugin == plugin.name]
            added = sum(change.added_parameters for change in changes)
            names = changes[0].name if len(changes) == 1 else f"{changes[0].name} ... {changes[-1].name}"
            layers = f"{len(changes)} layer{'s' if len(changes) > 1 else ''}"
            lines.append(f"  {plugin.name}  {plugin.title}: {layers} ({names}), {added:+,} parameters")
            lines += [f"       {detail}" for detail in dict.fromkeys(change.detail for change in changes)]
        if unused := [name for name in PLUGINS if name not in patched]:
            lines.append(f"  not patched: {', '.join(unused)}")
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """List the changed layers of a model with their cost in parameters."""
    changes = []
    for plugin, name, layer in patched_layers(model):
        new = PLUGINS[plugin].new_keys(layer)
        added = sum(value.numel() for key, value in layer.named_parameters() if key in new)
        if (old := original(layer)) is not None:
            added -= _count(old)
        changes.append(Change(plugin, name, added, PLUGINS[plugin].describe(layer)))
    return Description(type(model).__name__, _count(model), tuple(changes))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class IncompatibleKeys(NamedTuple):
    """Keys that were not loaded, as of `torch.nn.Module.load_state_dict`."""

    missing_keys: list[str]
    """Keys that only the patched model has; they keep their initial values."""
    unexpected_keys: list[str]
    """Keys of layers that a plugin replaced; `unpatch` restores them."""


def load_base_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> IncompatibleKeys:
    """Load the `state_dict` of a timm model into the same model patched, and return missing and unexpected keys.

    As in timm, the weights may be an entry of a checkpoint (`state_dict`, `model`, or their averages), and may be saved
    from DataParallel, DistributedDataParallel or torch.compile.

    Raises:
        ValueError: a key that no plugin added is missing, a key is unknown to the model without plugins, or a shape
            differs. The model is then unchanged.
    """
    state_dict = unwrapped(state_dict)
    new: set[str] = set()
    replaced: dict[str, Tensor] = {}
    for plugin, name, layer in patched_layers(model):
        new |= {f"{name}.{key}" for key in PLUGINS[plugin].new_keys(layer)}
        if (old := original(layer)) is not None:
            replaced |= {f"{name}.{key}": value for key, value in old.state_dict().items()}
    own = model.state_dict()
    expected = {key: value for key, value in own.items() if key not in new} | replaced
    if reason := misfit(state_dict, expected):
        raise ValueError(f"the weights do not fit the model without plugins: {reason}")
    model.load_state_dict({key: state_dict[key] for key in own if key not in new}, strict=False)
    for key, value in replaced.items():
        value.copy_(state_dict[key])
    return IncompatibleKeys([key for key in own if key in new], list(replaced))


def unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict within a checkpoint, with the names that the model itself has."""
    entry = next((checkpoint[name] for name in ENTRIES if isinstance(checkpoint.get(name), Mapping)), None)
    if entry is not None:
        return unwrapped(entry)
    names = dict(checkpoint)
    cleaned = clean_state_dict(names)  # one order of nesting at a time, in older versions of timm
    return cleaned if cleaned.keys() == names.keys() else unwrapped(cleaned)


def misfit(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return the first key that does not fit and how many others, from tensors by name; None if all fit."""
    missing = [f"{name} is missing" for name in expected if name not in actual]
    unexpected = [f"the model has no {name}" for name in actual if name not in expected]
    other = [
        f"{name} has shape {shape}, the model's has {own}"
        for name in expected
        if name in actual and (shape := _shape(actual[name])) != (own := _shape(expected[name]))
    ]
    first = [each[0] for each in (missing, unexpected, other) if each][:2]
    rest = len(missing) + len(unexpected) + len(other) - len(first)
    return (", ".join(first) + (f", and {rest:,} more" if rest else "")) if first else None


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))
