"""Options of the model, and of the weights that training starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from smallvit.config.options import Options, option
from smallvit.plugins import PLUGINS, PluginConfig
from smallvit.utils.errors import InputError, flag, require, suggest

ARCH = "vit"
"""The default architecture."""
ALIASES = {"vit96": "vit"}
"""Architectures that another name stands for at some image sizes."""
ARGUMENTS = {"plugin_init": "init", "drop_path": "drop_path_rate"}
"""Arguments of `create_model` that have another name than their option."""
BINARYVIT_PARTS = ("avg_pool_head", "pool_branches", "residual_affine", "pyramid")
"""Options that turn a binary DeiT into BinaryViT, in the order of its paper's ablation."""


def is_binaryvit(arch: str | None) -> bool:
    """Return whether an architecture is a BinaryViT of some size."""
    return (arch or "").startswith("binaryvit")


def default_plugins(arch: str | None) -> dict[str, bool]:
    """Return the plugins that an architecture has by default."""
    return {"binary": True} if is_binaryvit(arch) else {}


def added_plugins(arch: str | None, plugins: Iterable[str]) -> list[str]:
    """Return the plugins that an architecture does not have by default."""
    return [name for name in plugins if name not in default_plugins(arch)]


def split_arch(text: str) -> tuple[str, list[str]]:
    """Return architecture and plugins of `vit+spt+lsa`.

    Raises:
        InputError: no such plugin.
    """
    arch, *plugins = text.split("+")
    for name in plugins:
        if name not in PLUGINS:
            raise InputError(f"{text}: no such plugin as {name!r}{suggest(name, PLUGINS)}")
    return arch, plugins


def expand_arch(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat options in which an `arch` like `vit+spt+lsa` is written as arch="vit", spt=True, lsa=True.

    Raises:
        InputError: no such plugin, or one that is switched off by its own option.
    """
    text = options.get("arch")
    if not isinstance(text, str) or "+" not in text:
        return dict(options)
    arch, plugins = split_arch(text)
    if off := [name for name in plugins if options.get(name) is False]:
        raise InputError(f"--arch {text}: contradicts {flag(f'no_{off[0]}')}; remove one of them")
    return {**options, "arch": arch, **dict.fromkeys(plugins, True)}


def plugin_config(name: str, value: bool | Mapping[str, Any] | PluginConfig) -> PluginConfig | None:
    """Return the configuration of a plugin from True, its options, or itself; None for False.

    Raises:
        InputError: no such plugin, or a value that it does not accept.
    """
    if name not in PLUGINS:
        raise InputError(f"{name}: no such plugin{suggest(name, PLUGINS)}; expected one of {', '.join(PLUGINS)}")
    kind = PLUGINS[name].config
    if isinstance(value, kind) or value is False:
        return value or None
    try:
        return kind() if value is True else kind(**value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{flag(name)}-{error}" if isinstance(error, ValueError) else f"{flag(name)}: {error}"
        ) from None


def plugin_fields() -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and field of the options of all plugins: `spt`, `spt_directions`, ...

    Metadata names the plugin, and the field of its configuration.
    """
    for plugin in PLUGINS.values():
        yield plugin.name, bool, field(default=False, metadata={"plugin": plugin.name, "common": True})
        kinds = get_type_hints(plugin.config)
        for each in fields(plugin.config):
            metadata = {"plugin": plugin.name, "field": each.name}
            yield f"{plugin.name}_{each.name}", kinds[each.name], field(default=each.default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    arch: str | None = option(None, "common", "evaluation")
    """Architecture, such as vit+spt+lsa, or any of timm's (see smallvit list archs); by default that of --init, else
    vit."""


_Plugins = make_dataclass("_Plugins", plugin_fields(), bases=(_Architecture,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class ArchOptions(Options):
    """Options of some architectures, which `create_model` takes as keywords."""

    dropout: float | None = option(None, ge=0, lt=1)
    """Dropout after position embeddings, attention's projection and the layers of MLPs; none by default."""
    linear_drop_path: bool = False
    """Let stochastic depth rise linearly over a ViT's blocks, from 0 to --drop-path; timm's own always does."""
    global_pool: Literal["token", "avg"] = "token"
    """Pooling of a ViT: its class token, or the mean of patch tokens without a class token."""
    pos_embed: Literal["learned", "sincos"] = "learned"
    """Position embedding of a ViT: learned, or fixed 2D sines and cosines."""
    init_values: float | None = option(None, gt=0)
    """Initial value of a ViT's LayerScale, a learned factor per channel of every residual branch; none by default."""
    dist_token: bool = False
    """Add a distillation token with its own head; --distill token implies it."""
    dist_average: Literal["logits", "probabilities"] = "logits"
    """Average of the two heads at inference: of logits (DeiT's code) or of probabilities (its paper)."""
    avg_pool_head: bool = True
    """BinaryViT: the head reads the mean of all tokens, and there is no class token."""
    pool_branches: bool = True
    """BinaryViT: four pooling branches parallel to each MLP."""
    residual_affine: bool = True
    """BinaryViT: a learned factor and offset per channel before each residual addition."""
    pyramid: bool = True
    """BinaryViT: four stages with fewer and fewer tokens; otherwise one stage with the third one's tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ArchOptions, _Plugins):
    """Architecture, plugins and their options."""

    plugin_init: Literal["paper", "preserve"] = "paper"
    """Initialization of plugins: paper (as published), or preserve (outputs of the model do not change at first)."""
    patch_size: int | None = option(None, ge=1)
    """Patch size in pixels; by default it follows the image size (for a ViT 4 at 32 px, 8 at 64 px)."""
    drop_path: float | None = option(None, ge=0, lt=1)
    """Stochastic depth: probability of dropping a residual branch; by default 0.1 for transformers."""
    fit: bool = True
    """Adapt patches, windows or first layers of timm's models to small images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in self.plugins.items():
            plugin_config(name, values)
            if both := [other for other in PLUGINS[name].excludes if other in self.plugins]:
                raise InputError(f"{flag(name)} cannot be combined with {flag(both[0])}; remove one of them")

    def find_ineffective(self) -> list[tuple[str, str]]:
        """Return the options that have no effect, each with what it would need."""
        ineffective = [
            (f"no_{each.name}" if each.default is True else each.name, f"{flag(plugin)}; add it")
            for each in fields(self)
            if (plugin := each.metadata.get("plugin")) not in (None, *self.plugins)
            and getattr(self, each.name) != each.default
        ]
        if self.plugin_init == "preserve" and not self.plugins:
            ineffective.append(("plugin_init", "a plugin; add one, such as vit+spt+lsa"))
        return ineffective

    @property
    def plugins(self) -> dict[str, dict[str, Any]]:
        """Options of every plugin that the model has, by plugin."""
        names = [name for name in PLUGINS if getattr(self, name) or name in default_plugins(self.arch)]
        return {
            name: {each.name: getattr(self, f"{name}_{each.name}") for each in fields(PLUGINS[name].config)}
            for name in names
        }

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments of `create_model` except image size, channels and classes, all plain values."""
        options = {each.name: getattr(self, each.name) for each in fields(self) if "plugin" not in each.metadata}
        return {ARGUMENTS.get(name, name): value for name, value in options.items()} | {"plugins": self.plugins}


def flatten_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `ModelConfig` from arguments of `create_model`; defaults for those that are absent."""
    values = dict(spec) | {name: spec[argument] for name, argument in ARGUMENTS.items() if argument in spec}
    for name, options in spec.get("plugins", {}).items():
        values |= {name: True, **{f"{name}_{option}": value for option, value in options.items()}}
    if is_binaryvit(spec.get("arch")):
        values.pop("binary", None)
    return {each.name: values.get(each.name, each.default) for each in fields(ModelConfig)}


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights to start from, and which of them to freeze."""

    init: str | None = option(None, "common", "path")
    """Pretrained weights: a run folder, a .safetensors file, or a timm model (NAME or NAME:pretrained); they set
    architecture, plugins and image size unless given."""
    shrink: bool = False
    """With --init: start a smaller model (--arch) from evenly spaced weights of a larger one of its family."""
    weight_init: Literal["default", "mimetic", "impulse"] = "default"
    """Initial attention of a ViT, DeiT, CaiT or PiT: random, or structured (mimetic, impulse)."""
    freeze: str | None = None
    """Parameters to freeze: backbone (all but the heads), or comma-separated patterns of names such as
    'patch_embed.*,blocks.[0-5].*'; with --init, only those that it contains."""

    def __post_init__(self) -> None:
        require(self.init != "", "init", repr(self.init), "a run's folder, a weights file, or a timm model")
        if self.shrink and self.init is None:
            raise InputError("--shrink needs --init: the larger model whose weights are selected")
        if self.weight_init != "default" and self.init is not None:
            raise InputError(f"--weight-init {self.weight_init} contradicts --init; remove one of them")
        require(self.freeze is None or bool(self.frozen), "freeze", repr(self.freeze), "backbone, or patterns of names")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of parameters to freeze."""
        return tuple(name.strip() for name in (self.freeze or "").split(",") if name.strip())
