"""Which network is trained, and what it begins with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from smallvit.errors import InputError
from smallvit.options.checks import flag, require

PLUGINS = {"spt": "SPT", "lsa": "LSA", "binary": "binary"}
"""Options that put a plugin into the model, and what these are called; a plugin's own options begin with its name."""
BINARYVIT_PARTS = ("gap_head", "pool_branches", "residual_affine", "pyramid")
"""Options that make BinaryViT of a binary DeiT, in the order of its paper's ablation."""


def is_binaryvit(arch: str | None) -> bool:
    """Whether an architecture is a BinaryViT of some size, which has one-bit layers in any case."""
    return (arch or "").startswith("binaryvit")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to train."""

    arch: str | None = None
    """Architecture: vit, cait, pit, swin or t2t (the paper's), binaryvit or binaryvit_tiny (one-bit), resnet20 to
    resnet110 (CIFAR's), or any timm model name; by default vit, or the one that --init holds."""
    spt: bool = False
    """Shifted patch tokenization in the patch embedding and where patches are merged."""
    lsa: bool = False
    """Locality self-attention in every block."""
    plugin_init: Literal["paper", "exact"] = "paper"
    """How SPT and LSA begin: paper (as published), or exact (the model computes at first what it would without)."""
    spt_directions: Literal["diagonal", "cardinal", "all"] = "diagonal"
    """SPT's views beside the image: four diagonal ones (the paper's), four cardinal ones, or all eight."""
    spt_shift: float = 0.5
    """SPT: distance of the views as a share of the patch."""
    spt_norm: bool = True
    """SPT: normalise the views together before they are projected."""
    lsa_temperature: Literal["head", "layer", "fixed"] = "head"
    """LSA: one learnt temperature per head (the paper's), one per layer, or a fixed one."""
    lsa_mask: bool = True
    """LSA: keep tokens from attending to themselves."""
    binary: bool = False
    """One-bit weights, activations and attention in every block; binaryvit has them in any case."""
    binary_weights: bool = True
    """Binary layers: one-bit weights."""
    binary_activations: bool = True
    """Binary layers: one-bit activations, with a learnt threshold per channel."""
    binary_attention: bool = True
    """Binary layers: one-bit queries, keys, values and attention maps."""
    binary_downsampling: bool = True
    """Binary layers: those too by which patches are merged."""
    binary_shortcut: bool = True
    """Give layers of other models than binaryvit batch norms, shortcuts and RPReLUs with their bits."""
    gap_head: bool = True
    """BinaryViT: the head reads the mean of all tokens, and there is no class token."""
    pool_branches: bool = True
    """BinaryViT: four poolings beside each MLP."""
    residual_affine: bool = True
    """BinaryViT: a learnt factor and offset per channel before each residual addition."""
    pyramid: bool = True
    """BinaryViT: four stages of ever fewer tokens; otherwise one, of the third one's tokens."""
    patch_size: int | None = None
    """Patch size in pixels; by default it follows the image size (for a ViT 4 at 32 px, 8 at 64 px)."""
    dropout: float | None = None
    """Dropout after position embeddings, attention's projection and the layers of MLPs; by default none."""
    fit: bool = True
    """Give timm's models patches, windows or first layers fit for the image size; otherwise they are as timm has
    them."""
    dist_token: bool = False
    """A distillation token beside the class token, with a head of its own; --distill token adds it."""
    dist_average: Literal["logits", "probabilities"] = "logits"
    """What of the two heads is averaged at inference: logits (DeiT's code) or probabilities (its paper)."""
    drop_path: float | None = None
    """Stochastic depth: probability of skipping a residual branch; by default 0.1 for transformers."""
    rising_drop_path: bool = False
    """Let stochastic depth grow from 0 in a ViT's first block to --drop-path in its last; timm's own do so anyway."""
    average_pool: bool = False
    """Have a ViT's head read the mean of its patches' tokens; there is no class token then."""
    sincos: bool = False
    """Give a ViT fixed positions, sines and cosines, in place of learnt ones."""
    layer_scale: float | None = None
    """Give a ViT's residual branches a learnt factor per channel, which begins at this value; by default none."""

    def __post_init__(self) -> None:
        if self.patch_size is not None:
            require(self.patch_size >= 1, "patch_size", self.patch_size, "at least 1 pixel")
        for name in ("dropout", "drop_path"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "a probability below 1")
        if self.layer_scale is not None:
            require(0 < self.layer_scale < math.inf, "layer_scale", self.layer_scale, "a factor above 0")
        require(0 < self.spt_shift <= 1, "spt_shift", self.spt_shift, "a share of the patch above 0, at most 1")
        built_in = is_binaryvit(self.arch)
        for field_ in fields(self):
            plugin, value = field_.name.partition("_")[0], getattr(self, field_.name)
            has = plugin not in PLUGINS or getattr(self, plugin) or (plugin == "binary" and built_in)
            if value != field_.default and not has:
                raise InputError(f"{_given(field_.name, value)} is of no use without --{plugin}")
        if built_in and not self.binary_shortcut:
            raise InputError(f"--no-binary-shortcut: --arch {self.arch} has shortcuts of its own; leave it out")
        if self.plugin_init == "exact" and not (self.spt or self.lsa):
            raise InputError("--plugin-init exact is of no use without --spt or --lsa")
        if self.lsa_temperature == "fixed" and not self.lsa_mask:
            raise InputError("--lsa-temperature fixed --no-lsa-mask would leave nothing of LSA: give up one of them")
        if self.binary and not (self.binary_weights or self.binary_activations or self.binary_attention):
            raise InputError(
                "--binary: nothing would have one bit; leave it out, or give up one of the --no-binary-..."
            )


def _given(name: str, value: object) -> str:
    """An option as the command line has it."""
    return flag(f"no_{name}" if value is False else name)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Which weights training begins with, and which of them it leaves alone."""

    init: str | None = None
    """Trained weights: a run's folder, a weights file (.safetensors), or a timm model with pretrained weights, by name
    or as NAME:pretrained. Architecture, plugins and image size are theirs unless given."""
    freeze: str | None = None
    """Parameters that stay as they are: backbone (all but the heads), or patterns of names with commas between, such as
    'patch_embed.*,blocks.[0-5].*'."""

    def __post_init__(self) -> None:
        require(self.init != "", "init", repr(self.init), "a run's folder, a weights file, or a timm model")
        require(self.freeze is None or bool(self.frozen), "freeze", repr(self.freeze), "backbone, or patterns of names")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The patterns."""
        return tuple(name.strip() for name in (self.freeze or "").split(",") if name.strip())
