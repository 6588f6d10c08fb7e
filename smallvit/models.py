"""Architecture names to models: the paper's own, and any of timm's at the size of the images given.

`vit`, `cait`, `pit`, `swin` and `t2t` are those of Lee, Lee, Song 2021 (arXiv:2112.13492), from `published`; `registry`
tells timm of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import timm
from timm.models import is_model_in_modules
from torch import nn

from smallvit.errors import InputError, first_line, nearest
from smallvit.plugins import LSAConfig, SPTConfig, UnsupportedModelError, patch
from smallvit.published import PUBLISHED

DROP_PATH = 0.1
"""Stochastic depth of the paper's models, and of timm's transformers here."""

TINY_VIT = {"embed_dim": 96, "depth": 6, "num_heads": 6, "mlp_ratio": 2.0, "qkv_bias": False}
TINY_SIZE = 16
"""Image size in pixels up to which `vit` is the tiny one: the paper's has more weights than such images ask for."""

# Arguments by which timm's families take patches of p pixels (timm module: arguments)
TIMM_PATCH_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vision_transformer": lambda p: {"patch_size": p},
    "deit": lambda p: {"patch_size": p},
    "cait": lambda p: {"patch_size": p},
    "pit": lambda p: {"patch_size": p, "stride": p},
    "swin_transformer": lambda p: {"patch_size": p, "window_size": 4},
    "swin_transformer_v2": lambda p: {"patch_size": p, "window_size": 4},
}
MERGING = ("pit", "swin", "swin_transformer", "swin_transformer_v2")
"""Architectures and families that begin with patches of half the size and merge them."""


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
    fit: bool = True,
    dist_token: bool = False,
    dist_average: Literal["logits", "probabilities"] = "logits",
) -> nn.Module:
    """A freshly initialised model of images (b, in_chans, img_size, img_size), giving logits (b, num_classes).

    `patch_size` in pixels follows `img_size` unless given (PiT, Swin: the first stage's; T2T: what its unfolds make).
    `dropout` is none and `drop_path` 0.1 for transformers unless given. The other arguments are those of `ModelConfig`,
    all plain values, so that a checkpoint can hold them.

    Raises:
        InputError: unknown architecture, sizes that do not fit each other, or a plugin that does not fit.
    """
    require_known(arch)
    patch_size = patch_size or patch_for(arch, img_size)
    arguments = {
        "img_size": img_size,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "drop_path": drop_path,
    }
    model = (_published if arch in PUBLISHED else _timm_model)(arch, patch_size=patch_size, **arguments)
    if spt or lsa:
        spt_config = SPTConfig(directions=spt_directions, shift=spt_shift, norm=spt_norm)
        lsa_config = LSAConfig(temperature=lsa_temperature, mask=lsa_mask)
        try:
            patch(model, spt=spt and spt_config, lsa=lsa and lsa_config, init=plugin_init)
        except UnsupportedModelError as error:
            raise InputError(f"--arch {arch}: {error}") from None
    if dropout:
        _set_dropout(model, arch, dropout)
    return model


def require_known(arch: str) -> None:
    """Check an architecture's name.

    Raises:
        InputError: it is none; the line names the nearest. Or it names trained weights, which are not loaded here.
    """
    if arch in PUBLISHED:
        return
    base = timm.models.get_arch_name(arch)
    if not timm.is_model(base) or timm.get_pretrained_cfg(base) is None:
        names = [*PUBLISHED, *timm.list_models()]
        raise InputError(f"--arch {arch}: no such architecture{nearest(arch, names)}; see timm.list_models()")
    if arch != base:
        raise InputError(f"--arch {arch} names trained weights, but training starts from scratch; use {base}")


def patch_for(arch: str, img_size: int) -> int | None:
    """The patch size in pixels that `arch` uses for images of this size; None leaves it to timm.

    The patch in the name of a timm ViT, where at least 7 such patches fit along the side; else the largest power
    of two, at most 16, of which 7 fit (4 from 28 to 55 px, the paper's at 32; 8 up to 111, its patch at 64). For
    images of up to 16 px it is 2, and 1 below 8 px. PiT and Swin take half of it, and their own where it is 16.
    """
    family = arch if arch in PUBLISHED else _family(arch)
    if family is None:
        return None
    named = re.search(r"_patch(\d+)", arch)
    if named and family not in MERGING and img_size // int(named[1]) >= 7:
        return int(named[1])
    if img_size <= TINY_SIZE:
        patch = 2 if img_size >= 8 else 1
    else:
        patch = next(patch for patch in (16, 8, 4, 2) if img_size // patch >= 7)
    if family in MERGING:
        return max(1, patch // 2) if patch < 16 else None
    return patch


def describe_choice(arch: str, img_size: int, patch_size: int | None) -> str:
    """One line about what `arch` means for images of this size."""
    if arch == "vit" and img_size <= TINY_SIZE:
        width, depth = TINY_VIT["embed_dim"], TINY_VIT["depth"]
        return f"vit for {img_size}-pixel images: the tiny one, {width} wide, {depth} layers, patch {patch_size}"
    return f"{arch} for {img_size}-pixel images" + (f", patch {patch_size}" if patch_size else "")


def _published(
    arch: str, img_size: int, patch_size: int, num_classes: int, in_chans: int, drop_path: float | None
) -> nn.Module:
    _require_multiple(img_size, patch_size)
    smaller = {"size": TINY_VIT} if arch == "vit" and img_size <= TINY_SIZE else {}
    rate = DROP_PATH if drop_path is None else drop_path
    return PUBLISHED[arch](img_size, patch_size, num_classes, in_chans, rate, **smaller)


def _timm_model(
    arch: str, img_size: int, patch_size: int | None, num_classes: int, in_chans: int, drop_path: float | None
) -> nn.Module:
    family = _family(arch)
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if patch_size is not None:
        if family is None:
            raise InputError(f"--patch-size {patch_size}: {arch} has no patches whose size can be chosen")
        _require_multiple(img_size, patch_size)
        arguments |= TIMM_PATCH_ARGUMENTS[family](patch_size)
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        arguments |= {"img_size": img_size}
    if drop_path is not None or family:
        arguments |= {"drop_path_rate": DROP_PATH if drop_path is None else drop_path}
    try:
        return timm.create_model(arch, pretrained=False, **arguments)
    except Exception as error:  # whatever one of a thousand constructors raises at sizes not foreseen
        raise InputError(f"--arch {arch} cannot be built for {img_size}-pixel images: {first_line(error)}") from error


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


def _require_multiple(img_size: int, patch_size: int) -> None:
    if img_size % patch_size:
        below, above = img_size // patch_size * patch_size, -(-img_size // patch_size) * patch_size
        use = f"{below} or {above}" if below else f"{above}, or a smaller --patch-size"
        raise InputError(f"--img-size {img_size} is not a multiple of the patch size {patch_size}; use {use}")
