"""Architecture names to models: the paper's own, CIFAR's ResNets, and any of timm's at the size of the images given.

`vit`, `cait`, `pit`, `swin` and `t2t` are those of Lee, Lee, Song 2021 (arXiv:2112.13492), from `published`; `registry`
tells timm of them. `resnet20` to `resnet110` are those of He et al. 2016 (arXiv:1512.03385), from `convnets`; timm's
CNNs get stems for small images from `stems`. `binaryvit` is that of Le, Li 2023, and `binaryvit_tiny` a smaller one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import timm
from timm.layers import DropPath
from timm.models import is_model_in_modules
from torch import nn

from smallvit import stems, variants
from smallvit.binaryvit import BINARYVITS, parts_of
from smallvit.convnets import CIFAR_RESNETS, CIFARResNet
from smallvit.errors import InputError, first_line, nearest
from smallvit.options import BINARYVIT_PARTS
from smallvit.plugins import BinaryConfig, LSAConfig, SPTConfig, UnsupportedModelError, add_distillation_token, patch
from smallvit.published import PUBLISHED

DROP_PATH = 0.1
"""Stochastic depth of the paper's models, and of timm's transformers here."""

TINY_VIT = {"embed_dim": 96, "depth": 6, "num_heads": 6, "mlp_ratio": 2.0, "qkv_bias": False}
TINY, TINY_SIZE = "vit96", 16
"""What `vit` is for images of up to so many pixels: the paper's has more weights than such images ask for."""
OURS: dict[str, Callable[..., nn.Module]] = {
    **PUBLISHED,
    TINY: partial(PUBLISHED["vit"], size=TINY_VIT),
    **BINARYVITS,
}

PLAIN = ("vit", TINY)
"""Those that are timm's `VisionTransformer`, and take its variants."""

# Arguments by which timm's families take patches of p pixels (timm module: arguments)
TIMM_PATCH_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vision_transformer": lambda p: {"patch_size": p},
    "deit": lambda p: {"patch_size": p},
    "cait": lambda p: {"patch_size": p},
    "pit": lambda p: {"patch_size": p, "stride": p},
    "swin_transformer": lambda p: {"patch_size": p, "window_size": 4},
    "swin_transformer_v2": lambda p: {"patch_size": p, "window_size": 4},
}
MERGING = (*BINARYVITS, "pit", "swin", "swin_transformer", "swin_transformer_v2")
"""Architectures and families that begin with patches of half the size and merge them."""


EQUIPMENT = (
    *("spt", "lsa", "plugin_init", "spt_directions", "spt_shift", "spt_norm", "lsa_temperature", "lsa_mask"),
    *("binary", "binary_weights", "binary_activations", "binary_attention", "binary_downsampling", "binary_shortcut"),
    *("dist_token", "dist_average"),
)
"""Arguments of `create_model` that `equip` takes."""


def create_model(
    arch: str,
    *,
    img_size: int,
    num_classes: int,
    in_chans: int = 3,
    patch_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    spt: bool = False,
    lsa: bool = False,
    plugin_init: Literal["paper", "exact"] = "paper",
    spt_directions: Literal["diagonal", "cardinal", "all"] = "diagonal",
    spt_shift: float = 0.5,
    spt_norm: bool = True,
    lsa_temperature: Literal["head", "layer", "fixed"] = "head",
    lsa_mask: bool = True,
    binary: bool = False,
    binary_weights: bool = True,
    binary_activations: bool = True,
    binary_attention: bool = True,
    binary_downsampling: bool = True,
    binary_shortcut: bool = True,
    fit: bool = True,
    dist_token: bool = False,
    dist_average: Literal["logits", "probabilities"] = "logits",
    rising_drop_path: bool = False,
    average_pool: bool = False,
    sincos: bool = False,
    layer_scale: float | None = None,
    gap_head: bool = True,
    pool_branches: bool = True,
    residual_affine: bool = True,
    pyramid: bool = True,
) -> nn.Module:
    """A freshly initialised model of images (b, in_chans, img_size, img_size), giving logits (b, num_classes).

    `patch_size` in pixels follows `img_size` unless given (PiT, Swin: the first stage's; T2T: what its unfolds make).
    `dropout` is none and `drop_path` 0.1 for transformers unless given. Without `fit`, timm's models have their own
    patches, windows and stems. The other arguments are those of `ModelConfig`, all plain values, so that a checkpoint
    can hold them.

    Raises:
        InputError: unknown architecture, sizes that do not fit each other, or a plugin that does not fit.
    """
    require_known(arch)
    arch = resolved(arch, img_size, fit=fit)
    if patch_size and arch not in OURS and _family(arch) is None:
        raise InputError(f"--patch-size {patch_size}: {arch} has no patches whose size can be chosen")
    patch_size = patch_size or patch_for(arch, img_size, fit=fit)
    varied = variants.chosen(
        average_pool=average_pool, sincos=sincos, layer_scale=layer_scale, rising_drop_path=rising_drop_path
    )
    variants.require_plain(arch, varied, plain=_is_plain_vit(arch))
    changes = dict(zip(BINARYVIT_PARTS, (gap_head, pool_branches, residual_affine, pyramid), strict=True))
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **variants.arguments(varied)}
    arguments |= parts_of(arch, changes)
    if arch in OURS:
        model = _published(arch, img_size, patch_size, drop_path, **arguments)
    elif arch in CIFAR_RESNETS:
        model = CIFARResNet(CIFAR_RESNETS[arch], drop_path_rate=drop_path or 0.0, **arguments)
    else:
        model = _timm_model(arch, img_size, patch_size, drop_path, fit, **arguments)
    variants.finish(model, varied, DROP_PATH if drop_path is None else drop_path)
    equip(
        model,
        arch,
        spt=spt,
        lsa=lsa,
        plugin_init=plugin_init,
        spt_directions=spt_directions,
        spt_shift=spt_shift,
        spt_norm=spt_norm,
        lsa_temperature=lsa_temperature,
        lsa_mask=lsa_mask,
        binary=binary,
        binary_weights=binary_weights,
        binary_activations=binary_activations,
        binary_attention=binary_attention,
        binary_downsampling=binary_downsampling,
        binary_shortcut=binary_shortcut,
        dist_token=dist_token,
        dist_average=dist_average,
    )
    if dropout:
        _set_dropout(model, arch, dropout)
    return model


def equip(
    model: nn.Module,
    arch: str,
    *,
    spt: bool,
    lsa: bool,
    plugin_init: Literal["paper", "exact"],
    spt_directions: Literal["diagonal", "cardinal", "all"],
    spt_shift: float,
    spt_norm: bool,
    lsa_temperature: Literal["head", "layer", "fixed"],
    lsa_mask: bool,
    binary: bool,
    binary_weights: bool,
    binary_activations: bool,
    binary_attention: bool,
    binary_downsampling: bool,
    binary_shortcut: bool,
    dist_token: bool,
    dist_average: Literal["logits", "probabilities"],
) -> None:
    """Put plugins and a distillation token into a model, in place; what it has already stays.

    Raises:
        InputError: one of them does not fit.
    """
    spt_config = SPTConfig(directions=spt_directions, shift=spt_shift, norm=spt_norm)
    lsa_config = LSAConfig(temperature=lsa_temperature, mask=lsa_mask)
    bits = {"weights": binary_weights, "activations": binary_activations, "attention": binary_attention}
    binary = (binary or arch in BINARYVITS) and any(bits.values())
    try:
        if spt or lsa:
            patch(model, spt=spt and spt_config, lsa=lsa and lsa_config, init=plugin_init)
        if binary:
            patch(model, binary=BinaryConfig(**bits, downsampling=binary_downsampling, shortcut=binary_shortcut))
    except UnsupportedModelError as error:
        raise InputError(f"--arch {arch}: {error}") from None
    if dist_average != "logits" and not dist_token:
        raise InputError(f"--dist-average {dist_average} is of no use without --dist-token, or --distill token")
    try:
        if dist_token:
            add_distillation_token(model, dist_average)
    except UnsupportedModelError as error:
        raise InputError(f"--distill token: --arch {arch}: {error}; give --distill hard or soft") from None


def require_known(arch: str) -> None:
    """Check an architecture's name.

    Raises:
        InputError: it is none; the line names the nearest. Or it names trained weights, which --init takes.
    """
    if arch in OURS or arch in CIFAR_RESNETS:
        return
    base = timm.models.get_arch_name(arch)
    if not timm.is_model(base) or timm.get_pretrained_cfg(base) is None:
        names = [*OURS, *CIFAR_RESNETS, *timm.list_models()]
        raise InputError(f"--arch {arch}: no such architecture{nearest(arch, names)}; see timm.list_models()")
    if arch != base:
        raise InputError(f"--arch {arch} names trained weights; give --init {arch}, or begin from scratch with {base}")


def resolved(arch: str, img_size: int, *, fit: bool = True) -> str:
    """The architecture that a name stands for, at this image size."""
    return TINY if arch == "vit" and fit and img_size <= TINY_SIZE else arch


def patch_for(arch: str, img_size: int, *, fit: bool = True) -> int | None:
    """The patch size in pixels that `arch` uses for images of this size; None leaves it to timm, as without `fit`.

    The patch in the name of a timm ViT, where at least 7 such patches fit along the side; else the largest power
    of two, at most 16, of which 7 fit (4 from 28 to 55 px, the paper's at 32; 8 up to 111, its patch at 64). For
    images of up to 16 px it is 2, and 1 below 8 px. PiT and Swin take half of it, and their own where it is 16.
    """
    family = arch if arch in OURS else _family(arch)
    if family is None or not (fit or arch in OURS):
        return None
    named = re.search(r"_patch(\d+)", arch)
    if named and family not in MERGING and img_size // int(named[1]) >= 7:
        return int(named[1])
    if img_size <= TINY_SIZE:
        patch = 2 if img_size >= 8 else 1
    else:
        patch = next(patch for patch in (16, 8, 4, 2) if img_size // patch >= 7)
    if family in BINARYVITS:
        return patch // 4 if patch == 16 else max(1, patch // 2)
    if family in MERGING:
        return max(1, patch // 2) if patch < 16 else None
    return patch


def describe_choice(arch: str, img_size: int, patch_size: int | None, *, fit: bool = True) -> str:
    """One line about what `arch` means for images of this size."""
    if arch == TINY:
        width, depth = TINY_VIT["embed_dim"], TINY_VIT["depth"]
        return f"vit for {img_size}-pixel images: the tiny one, {width} wide, {depth} layers, patch {patch_size}"
    undone = _stem(arch, img_size) if fit else None
    stride = f", stride {undone.stride} instead of {undone.own}" if undone else ""
    return f"{arch} for {img_size}-pixel images" + (f", patch {patch_size}" if patch_size else stride)


def fitted_stride(arch: str, img_size: int, *, fit: bool = True) -> int | None:
    """The stride of one of timm's CNNs whose stem is made fit for images of this size; None where it is not."""
    undone = _stem(arch, img_size) if fit else None
    return undone and undone.stride


def _published(
    arch: str, img_size: int, patch_size: int, drop_path: float | None, num_classes: int, in_chans: int, **more: Any
) -> nn.Module:
    if arch not in BINARYVITS:
        _require_multiple(img_size, patch_size)
    rate = DROP_PATH if drop_path is None else drop_path
    return OURS[arch](img_size, patch_size, num_classes, in_chans, rate, **more)


def _timm_model(
    arch: str,
    img_size: int,
    patch_size: int | None,
    drop_path: float | None,
    fit: bool,
    **arguments: Any,
) -> nn.Module:
    family = _family(arch)
    if patch_size is not None:
        _require_multiple(img_size, patch_size)
        arguments |= TIMM_PATCH_ARGUMENTS[family](patch_size)
        if not fit:
            arguments.pop("window_size", None)
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        arguments |= {"img_size": img_size}
    if drop_path or family:
        arguments |= {"drop_path_rate": DROP_PATH if drop_path is None else drop_path}
    try:
        model = timm.create_model(arch, pretrained=False, **arguments)
    except Exception as error:  # whatever one of a thousand constructors raises at sizes not foreseen
        raise InputError(f"--arch {arch} cannot be built for {img_size}-pixel images: {first_line(error)}") from error
    if drop_path == 0:
        _keep_paths(model)
    if fit and (undone := _stem(arch, img_size)):
        stems.apply(model, undone)
    return model


def _stem(arch: str, img_size: int) -> stems.Fit | None:
    """What of its downsampling a CNN of timm's does without, for images of this size."""
    ours = arch in OURS or arch in CIFAR_RESNETS
    return None if ours or _family(arch) else stems.fit_for(arch, img_size)


def _keep_paths(model: nn.Module) -> None:
    """No stochastic depth, in models too whose constructors know no rate of it, or have one of their own."""
    for layer in model.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters that turn features into logits."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def checkpoint_gradients(model: nn.Module, arch: str) -> None:
    """Have the backward pass compute a model's activations again, instead of keeping them.

    Raises:
        InputError: the model cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        raise InputError(f"--grad-checkpointing: {arch} cannot compute its activations again; leave it out") from None


def _set_dropout(model: nn.Module, arch: str, rate: float) -> None:
    """Give their rate to the layers of dropout that timm's transformers have, those on attention maps excepted."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Dropout) and name.split(".")[-1] in ("pos_drop", "proj_drop", "drop1", "drop2")
    ]
    if not layers:
        raise InputError(f"--dropout {rate}: {arch} has no layers for it")
    for layer in layers:
        layer.p = rate


def _family(arch: str) -> str | None:
    """The timm module of an architecture, if it is one of those that take patch arguments."""
    return next((name for name in TIMM_PATCH_ARGUMENTS if is_model_in_modules(arch, [name])), None)


def _is_plain_vit(arch: str) -> bool:
    """Whether it is timm's `VisionTransformer`, with one class token at most."""
    return arch in PLAIN or (_family(arch) in ("vision_transformer", "deit") and "distilled" not in arch)


def _require_multiple(img_size: int, patch_size: int) -> None:
    if img_size % patch_size:
        below, above = img_size // patch_size * patch_size, -(-img_size // patch_size) * patch_size
        use = f"{below} or {above}" if below else f"{above}, or a smaller --patch-size"
        raise InputError(f"--img-size {img_size} is not a multiple of the patch size {patch_size}; use {use}")
