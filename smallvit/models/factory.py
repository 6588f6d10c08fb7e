"""Create models: those of this package and timm's, adapted to small images, with plugins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from timm.layers import DropPath, build_sincos2d_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smallvit.config.model import (
    BINARYVIT_PARTS,
    ArchOptions,
    default_plugins,
    is_binaryvit,
    plugin_config,
    split_arch,
)
from smallvit.models.architectures import CIFAR_RESNETS, OURS, require_multiple, require_name
from smallvit.plugins import BinaryConfig, PluginConfig
from smallvit.plugins.patch import UnsupportedModelError, patch
from smallvit.utils.errors import InputError, first_line, flag
from smallvit.utils.hardware import is_convolutional, precision_name
from smallvit.utils.sizes import ImageSize, height_width, parse_size

if TYPE_CHECKING:
    from smallvit.models.small_stems import StemPlan

DROP_PATH = 0.1
"""Default stochastic depth of transformers, as in Lee et al. 2021."""
TINY, TINY_SIZE = "vit96", 16
"""The model that `vit` stands for at image sizes up to this one, in pixels."""
VIT_OPTIONS = ("linear_drop_path", "global_pool", "pos_embed", "init_values")
"""Options of `ArchOptions` that only timm's `VisionTransformer` has."""

# Arguments by which timm's families take patches of p pixels (timm module: arguments)
TIMM_PATCH_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vision_transformer": lambda p: {"patch_size": p},
    "deit": lambda p: {"patch_size": p},
    "cait": lambda p: {"patch_size": p},
    "pit": lambda p: {"patch_size": p, "stride": p},
    "swin_transformer": lambda p: {"patch_size": p, "window_size": 4},
    "swin_transformer_v2": lambda p: {"patch_size": p, "window_size": 4},
}
MERGING = ("binaryvit", "binaryvit_tiny", "pit", "swin", "swin_transformer", "swin_transformer_v2")
"""Architectures and families whose first patches have half the size and are merged."""


def create_model(
    arch: str,
    *,
    img_size: int | tuple[int, int],
    num_classes: int,
    in_chans: int = 3,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    plugins: Mapping[str, bool | Mapping[str, Any] | PluginConfig] = MappingProxyType({}),
    init: Literal["paper", "preserve"] = "paper",
    fit: bool = True,
    **model_kwargs: Any,
) -> nn.Module:
    """Create a model of images (b, in_chans, height, width) that returns logits (b, num_classes).

    Args:
        arch: an architecture, with or without plugins: `vit`, `vit+spt+lsa`, `deit_tiny_patch16_224+lsa`.
        img_size: side of square images in pixels, or height and width.
        patch_size: in pixels, by default chosen for `img_size` (PiT, Swin: of the first stage; T2T: of its unfolds).
        drop_path_rate: stochastic depth, by default 0.1 for transformers.
        plugins: by name, each True, its options or its configuration, in addition to those in `arch`.
        init: see `patch`.
        fit: adapt patches, windows and stems of timm's models to `img_size`.
        model_kwargs: fields of `ArchOptions`.

    Raises:
        InputError: unknown architecture, sizes that do not fit each other, or a plugin that does not fit.
    """
    arch, names = split_arch(arch)
    img_size = parse_size(img_size)
    plugins = default_plugins(arch) | dict.fromkeys(names, True) | dict(plugins)
    options = ArchOptions(**model_kwargs)
    require_known(arch)
    arch = resolve_arch(arch, img_size, fit=fit)
    if patch_size and arch not in OURS and _family(arch) is None:
        raise InputError(f"--patch-size {patch_size}: {arch} has no patch size to choose")
    patch_size = patch_size or default_patch_size(arch, img_size, fit=fit)
    _require_vit_options(arch, options)
    arguments = {"num_classes": num_classes, "in_chans": in_chans}
    if options.global_pool == "avg":
        arguments |= {"class_token": False, "global_pool": "avg"}
    if options.init_values is not None:
        arguments |= {"init_values": options.init_values}
    arguments |= _binaryvit_arguments(arch, {name: getattr(options, name) for name in BINARYVIT_PARTS})
    if arch in OURS:
        if not is_binaryvit(arch):
            require_multiple(img_size, patch_size)
        rate = DROP_PATH if drop_path_rate is None else drop_path_rate
        model = _load(OURS[arch])(img_size=img_size, patch_size=patch_size, drop_path_rate=rate, **arguments)
    elif arch in CIFAR_RESNETS:
        arguments |= {"depth": CIFAR_RESNETS[arch], "drop_path_rate": drop_path_rate or 0.0}
        model = _load("cifar_resnet.CIFARResNet")(**arguments)
    else:
        model = _timm_model(arch, img_size, patch_size, drop_path_rate, fit, **arguments)
    _finish_vit(model, options, DROP_PATH if drop_path_rate is None else drop_path_rate)
    equip(model, arch, plugins, init, options)
    if options.dropout:
        _set_dropout(model, arch, options.dropout)
    return model


def equip(
    model: nn.Module,
    arch: str,
    plugins: Mapping[str, bool | Mapping[str, Any] | PluginConfig],
    init: Literal["paper", "preserve"] = "paper",
    options: ArchOptions | None = None,
) -> None:
    """Add plugins and a distillation token to a model, in place; those it has already stay unchanged.

    Raises:
        InputError: one of them does not fit.
    """
    options = options or ArchOptions()
    configs = {name: plugin_config(name, value) for name, value in plugins.items()}
    if is_binaryvit(arch) and not _has_bits(configs):
        configs = {}  # in full precision
    try:
        if configs := {name: config for name, config in configs.items() if config is not None}:
            patch(model, init=init, **configs)
    except UnsupportedModelError as error:
        raise InputError(f"--arch {arch}: {error}") from None
    if options.dist_token:
        from smallvit.plugins.distillation import add_distillation_token

        try:
            add_distillation_token(model, options.dist_average)
        except UnsupportedModelError as error:
            raise InputError(f"--distill token: --arch {arch}: {error}; use --distill hard or soft") from None


def require_known(arch: str) -> None:
    """Check the name of an architecture.

    Raises:
        InputError: it is unknown (the closest is named), or the name of pretrained weights, which --init takes.
    """
    require_name(arch)
    if arch != (base := timm.models.get_arch_name(arch)):
        raise InputError(f"--arch {arch} names trained weights; give --init {arch}, or train {base} from scratch")


def resolve_arch(arch: str, img_size: ImageSize, *, fit: bool = True) -> str:
    """Return the architecture that a name stands for at an image size."""
    return TINY if arch == "vit" and fit and min(height_width(img_size)) <= TINY_SIZE else arch


def default_patch_size(arch: str, img_size: ImageSize, *, fit: bool = True) -> int | None:
    """Return the patch size in pixels of `arch` for an image size; None leaves it to timm, as without `fit`.

    The patch in the name of a timm ViT, where at least 7 such patches fit along the shorter side; else the largest
    power of two, at most 16, of which 7 fit (4 from 28 to 55 px, the paper's at 32; 8 up to 111, its patch at 64). For
    images of up to 16 px it is 2, and 1 below 8 px. PiT and Swin take half of it, and their own where it is 16.
    """
    family = arch if arch in OURS else _family(arch)
    if family is None or not (fit or arch in OURS):
        return None
    named, side = re.search(r"_patch(\d+)", arch), min(height_width(img_size))
    if named and family not in MERGING and side // int(named[1]) >= 7:
        return int(named[1])
    if side <= TINY_SIZE:
        patch = 2 if side >= 8 else 1
    else:
        patch = next(patch for patch in (16, 8, 4, 2) if side // patch >= 7)
    if is_binaryvit(family):
        return patch // 4 if patch == 16 else max(1, patch // 2)
    if family in MERGING:
        return max(1, patch // 2) if patch < 16 else None
    return patch


def describe_choice(arch: str, img_size: ImageSize, patch_size: int | None, *, fit: bool = True) -> str:
    """Describe in one line the model that `arch` creates at an image size."""
    if arch == TINY:
        return f"vit for {img_size}-pixel images: the tiny one, 96 wide, 6 layers, patch {patch_size}"
    stem = _stem(arch, img_size) if fit else None
    stride = f", stride {stem.stride} instead of {stem.timm_stride}" if stem else ""
    return f"{arch} for {img_size}-pixel images" + (f", patch {patch_size}" if patch_size else stride)


def adapted_stride(arch: str, img_size: ImageSize, *, fit: bool = True) -> int | None:
    """Return the total stride of one of timm's CNNs with an adapted stem; None if it is not adapted."""
    stem = _stem(arch, img_size) if fit else None
    return stem and stem.stride


def _timm_model(
    arch: str, img_size: ImageSize, patch_size: int | None, drop_path_rate: float | None, fit: bool, **arguments: Any
) -> nn.Module:
    family = _family(arch)
    if patch_size is not None:
        require_multiple(img_size, patch_size)
        arguments |= TIMM_PATCH_ARGUMENTS[family](patch_size)
        if not fit:
            arguments.pop("window_size", None)
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        arguments |= {"img_size": img_size}
    if drop_path_rate or family:
        arguments |= {"drop_path_rate": DROP_PATH if drop_path_rate is None else drop_path_rate}
    try:
        model = timm.create_model(arch, pretrained=False, **arguments)
    except Exception as error:  # any that a timm constructor raises for sizes it does not support
        raise InputError(f"--arch {arch} cannot be created for {img_size}-pixel images: {first_line(error)}") from error
    if drop_path_rate == 0:  # for constructors without this argument, or with their own rate
        for layer in model.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0
    if fit and (stem := _stem(arch, img_size)):
        _load("small_stems.adapt_stem")(model, stem)
    return model


def _require_vit_options(arch: str, options: ArchOptions) -> None:
    """Check that options of `VisionTransformer` are used with one that has one class token at most."""
    plain = arch in ("vit", TINY) or (_family(arch) in ("vision_transformer", "deit") and "distilled" not in arch)
    for name in VIT_OPTIONS:
        if not plain and getattr(options, name) != getattr(ArchOptions, name):
            raise InputError(f"{flag(name)}: --arch {arch} is no plain ViT; use vit or a vit_... of timm, or remove it")


def _finish_vit(model: VisionTransformer, options: ArchOptions, drop_path_rate: float) -> None:
    """Apply the options for which timm's `VisionTransformer` has no argument, in place."""
    if options.init_values is not None and not all(hasattr(block, "ls1") for block in model.blocks):
        raise InputError("--init-values: the blocks of this model have no LayerScale; remove it")
    if options.pos_embed == "sincos":
        learned = model.pos_embed
        if learned is None or model.embed_dim % 4:
            raise InputError("--pos-embed sincos: the model has no position embedding, or a width not divisible by 4")
        patches = build_sincos2d_pos_embed(model.patch_embed.grid_size, model.embed_dim, device=learned.device)
        prefix = patches.new_zeros(learned.shape[1] - len(patches), model.embed_dim)
        model.pos_embed = nn.Parameter(torch.cat([prefix, patches])[None].to(learned.dtype), requires_grad=False)
    if options.linear_drop_path:
        rates = torch.linspace(0, drop_path_rate, len(model.blocks), device="cpu").tolist()
        for block, rate in zip(model.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def _load(path: str) -> Callable[..., Any]:
    """Import a function or class of this package."""
    module, _, name = path.partition(".")
    return getattr(import_module(f"smallvit.models.{module}"), name)


def _has_bits(configs: Mapping[str, PluginConfig | None]) -> bool:
    """Return whether a BinaryViT with these plugins has any one-bit layer."""
    config = configs.get("binary")
    return isinstance(config, BinaryConfig) and (config.weights or config.activations or config.attention)


def _binaryvit_arguments(arch: str, options: Mapping[str, bool]) -> dict[str, bool]:
    """Return the options of a BinaryViT; nothing for other architectures.

    Raises:
        InputError: an option is switched off for another architecture.
    """
    if is_binaryvit(arch):
        return dict(options)
    if off := [name for name, on in options.items() if not on]:
        raise InputError(f"{flag(f'no_{off[0]}')}: --arch {arch} is not a BinaryViT; remove it")
    return {}


def _stem(arch: str, img_size: ImageSize) -> StemPlan | None:
    """Return the plan that adapts the stem of one of timm's CNNs to small images; None if it is not adapted."""
    ours = arch in OURS or arch in CIFAR_RESNETS
    return None if ours or _family(arch) else _load("small_stems.plan_stem")(arch, img_size)


def classifier_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the classifier heads."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def enable_grad_checkpointing(model: nn.Module, arch: str) -> None:
    """Enable gradient checkpointing.

    Raises:
        InputError: the model does not support it.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        raise InputError(f"--grad-checkpointing: {arch} does not support it; remove it") from None


def _set_dropout(model: nn.Module, arch: str, rate: float) -> None:
    """Set the rate of the dropout layers of timm's transformers, except those on attention maps."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Dropout) and name.split(".")[-1] in ("pos_drop", "proj_drop", "drop1", "drop2")
    ]
    if not layers:
        raise InputError(f"--dropout {rate}: {arch} has no dropout layers")
    for layer in layers:
        layer.p = rate


def _family(arch: str) -> str | None:
    """Return the timm module of an architecture, if it is one of `TIMM_PATCH_ARGUMENTS`."""
    return next((name for name in TIMM_PATCH_ARGUMENTS if is_model_in_modules(arch, [name])), None)


def prepare_for_inference(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a model to a device in evaluation mode, with the fast attention path and memory format."""
    from smallvit.plugins.sdpa import set_fused_attention

    set_fused_attention(model, device.type, dtype)
    model.eval().to(device)
    return model.to(memory_format=torch.channels_last) if is_convolutional(model) else model


def fuse_for_inference(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a fused copy of a patched model in fp32; other models themselves, since half precision rounds it apart."""
    from smallvit.plugins.patch import fuse, patched_layers

    is_patched = any(True for _ in patched_layers(model))
    return fuse(model) if is_patched and precision_name(device, dtype) == "fp32" else model
