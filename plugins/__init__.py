"""Shifted patch tokenization and locality self-attention for timm models.

    import timm, smallvit
    model = timm.create_model("deit_small_patch16_224", num_classes=100)
    smallvit.patch(model, spt=True, lsa=True)

Only leaf modules are replaced (`blocks.i.attn` and `patch_embed.proj`), so forward passes, parameter names and
everything else of timm stay as they are. A replacement carries the module it stands for, unregistered: absent
from `parameters()` and `state_dict()`, present in copies and pickles, and handed back by `unpatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smallvit.plugins.attend import set_fused_attention
from smallvit.plugins.lsa import LocalitySelfAttention, locality_attention
from smallvit.plugins.spt import ShiftedPatchTokenization

__all__ = [
    "LocalitySelfAttention",
    "ShiftedPatchTokenization",
    "UnsupportedModelError",
    "describe",
    "locality_attention",
    "patch",
    "set_fused_attention",
    "unpatch",
]


class UnsupportedModelError(TypeError):
    """A model, or the part of it that a plugin replaces, is none that the plugin knows."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a plugin replaces in a timm model: the third step of its file, where timm's classes are known."""

    title: str
    replaces: str
    new: type[nn.Module]
    sites: Callable[[nn.Module], dict[str, nn.Module]]
    """Qualified name and module of every place where the plugin fits and is not yet."""
    install: Callable[[nn.Module], nn.Module]
    """The replacement of a module found by `sites`."""
    restore: Callable[[nn.Module, nn.Module], nn.Module]
    """The original again, from the replacement and the original as it was put aside."""
    detail: Callable[[nn.Module], str]
    """What the replacement does differently, in a few words."""


def _patchify_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    embeddings = {f"{name}.proj": m.proj for name, m in model.named_modules() if type(m) is PatchEmbed}
    return {name: proj for name, proj in embeddings.items() if isinstance(proj, nn.Conv2d)}


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m) is Attention}


PLUGINS: dict[str, Plugin] = {
    "spt": Plugin(
        title="shifted patch tokenization",
        replaces="the convolution of timm.layers.PatchEmbed",
        new=ShiftedPatchTokenization,
        sites=_patchify_convolutions,
        install=ShiftedPatchTokenization.from_conv,
        restore=lambda spt, conv: conv.to(spt.proj.weight.device, spt.proj.weight.dtype).train(spt.training),
        detail=lambda spt: "a token sees {}x{} pixels instead of {}x{}".format(*spt.window, *spt.patch_size),
    ),
    "lsa": Plugin(
        title="locality self-attention",
        replaces="timm.layers.Attention",
        new=LocalitySelfAttention,
        sites=_attentions,
        install=LocalitySelfAttention.from_timm,
        restore=LocalitySelfAttention.to_timm,
        detail=lambda lsa: f"{lsa.num_heads} temperatures, no token attends to itself",
    ),
}

MODELS: tuple[type[nn.Module], ...] = (VisionTransformer,)
"""The timm classes whose instances can be patched; DeiT and its distilled form derive from them."""


def patch(model: nn.Module, *, spt: bool = False, lsa: bool = False) -> nn.Module:
    """Put SPT and/or LSA into a timm model, in place, and return it.

    What is patched already stays as it is, so patching twice changes nothing. LSA keeps the trained weights of
    the attention layers and starts at their scale; SPT's weights are new (the paper's initial values).

    Raises:
        UnsupportedModelError: the model is none of `MODELS`, or has no layer that the plugin can replace.
            The model is then unchanged.
        ValueError: neither plugin was asked for.
    """
    chosen = [name for name, wanted in {"spt": spt, "lsa": lsa}.items() if wanted]
    if not chosen:
        raise ValueError("choose what to patch: spt=True, lsa=True or both")
    found = {name: _sites_or_error(model, PLUGINS[name]) for name in chosen}
    for plugin, sites in found.items():
        for name, original in sites.items():
            replacement = PLUGINS[plugin].install(original)
            object.__setattr__(replacement, "original", original)  # beside the registry: no submodule
            model.set_submodule(name, replacement)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Make a patched model timm's own again, in place, and return it; a plain model stays as it is.

    Attention layers keep what they learnt while patched, except the temperatures. The patch embedding is the
    convolution from before the patch, with its weights of that time, since SPT's do not fit into it.
    """
    for plugin, name, replacement in _patched(model):
        model.set_submodule(name, PLUGINS[plugin].restore(replacement, replacement.original))
    return model


@dataclass(frozen=True)
class Change:
    """One replaced layer: the plugin, the layer's name in the model, its parameters before and after."""

    plugin: str
    name: str
    parameters_before: int
    parameters_after: int
    detail: str


@dataclass(frozen=True)
class Description:
    """What is patched in a model, where, and what it costs; `print` it."""

    model: str
    parameters: int
    changes: tuple[Change, ...]

    @property
    def added_parameters(self) -> int:
        """Parameters that the model has more than unpatched."""
        return sum(change.parameters_after - change.parameters_before for change in self.changes)

    def __str__(self) -> str:
        before = self.parameters - self.added_parameters
        lines = [f"{self.model}: {self.parameters:,} parameters, {before:,} without plugins"]
        for key, plugin in PLUGINS.items():
            changes = [change for change in self.changes if change.plugin == key]
            if not changes:
                lines.append(f"  {key}  {plugin.title}: not patched")
                continue
            added = sum(change.parameters_after - change.parameters_before for change in changes)
            where = changes[0].name if len(changes) == 1 else f"{changes[0].name} ... {changes[-1].name}"
            layers = f"{len(changes)} layer{'s' if len(changes) > 1 else ''}"
            lines.append(f"  {key}  {plugin.title}: {layers} ({where}), {added:+,} parameters")
            lines.append(f"       {changes[0].detail}")
        return "\n".join(lines)


def describe(model: nn.Module) -> Description:
    """List the replaced layers of a model with their cost in parameters."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    changes = [
        Change(key, name, size(new.original), size(new), PLUGINS[key].detail(new)) for key, name, new in _patched(model)
    ]
    return Description(type(model).__name__, size(model), tuple(changes))


def _patched(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(plugin, qualified name, replacement) of every replaced layer."""
    return [
        (key, name, module)
        for key, plugin in PLUGINS.items()
        for name, module in model.named_modules()
        if type(module) is plugin.new and "original" in vars(module)
    ]


def _sites_or_error(model: nn.Module, plugin: Plugin) -> dict[str, nn.Module]:
    kind = type(model).__name__
    if not isinstance(model, MODELS):
        known = ", ".join(f"timm's {model_class.__name__}" for model_class in MODELS)
        raise UnsupportedModelError(f"cannot patch {kind}: supported are {known} and classes derived from it")
    sites = plugin.sites(model)
    if not sites and not any(type(module) is plugin.new for module in model.modules()):
        raise UnsupportedModelError(
            f"cannot patch this {kind} with {plugin.title}: it replaces {plugin.replaces}, and there is none"
        )
    return sites
