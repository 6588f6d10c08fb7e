"""Plugins for timm models: shifted patch tokenization, locality self-attention, one-bit layers.

    import timm, smallvit
    model = timm.create_model("deit_small_patch16_224", num_classes=100)
    smallvit.patch(model, spt=True, lsa=True)

Plugins change leaf modules only: attention layers, patch embeddings, poolings and mergings of patches, linear layers.
Forward passes of timm stay unchanged, and so do parameter names, except in layers that are replaced.
"""

# ruff: noqa: F401, I001

from smallvit.plugins.base import Plugin, PluginConfig

# One line per plugin, in the order in which they are applied
from smallvit.plugins.spt import SPT, SPTConfig
from smallvit.plugins.lsa import LSA, LSAConfig
from smallvit.plugins.binary import BINARY, BinaryConfig
from smallvit.plugins.ffn import FFN, FFNConfig
from smallvit.plugins.stem import STEM, StemConfig
from smallvit.plugins.xsa import XSA, XSAConfig

PLUGINS: dict[str, Plugin] = {each.name: each for each in list(globals().values()) if isinstance(each, Plugin)}
"""All plugins by name, in the order in which they are applied."""
