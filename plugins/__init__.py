"""Plugins for timm models: shifted patch tokenization, locality self-attention, one-bit layers.

    import timm, smallvit
    model = timm.create_model("deit_small_patch16_224", num_classes=100)
    smallvit.patch(model, spt=True, lsa=True)

Plugins change leaf modules only: attention layers, patch embeddings, poolings and mergings of patches, linear layers.
Forward passes of timm stay unchanged, and so do parameter names, except in layers that are replaced.
"""

from smallvit.plugins.base import Plugin, PluginConfig
from smallvit.plugins.binary import BINARY, BinaryConfig
from smallvit.plugins.ffn import FFN, FFNConfig
from smallvit.plugins.lsa import LSA, LSAConfig
from smallvit.plugins.spt import SPT, SPTConfig
from smallvit.plugins.stem import STEM, StemConfig
from smallvit.plugins.xsa import XSA, XSAConfig

__all__ = [
    "PLUGINS",
    "BinaryConfig",
    "FFNConfig",
    "LSAConfig",
    "Plugin",
    "PluginConfig",
    "SPTConfig",
    "StemConfig",
    "XSAConfig",
]

PLUGINS: dict[str, Plugin] = {
    "spt": SPT,
    "lsa": LSA,
    "binary": BINARY,
    "ffn": FFN,
    "stem": STEM,
    "xsa": XSA,
}
"""All plugins by name, in the order in which they are applied."""
