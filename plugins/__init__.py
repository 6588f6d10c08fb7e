"""Shifted patch tokenization and locality self-attention for timm models.

    import timm, smallvit
    model = timm.create_model("deit_small_patch16_224", num_classes=100)
    smallvit.patch(model, spt=True, lsa=True)

Only leaf modules change: attention layers, patch embeddings, poolings and mergings of patches. Forward passes,
parameter names and everything else of timm stay as they are.
"""

from smallvit.plugins.binary import BinaryConfig
from smallvit.plugins.binary_packed import pack
from smallvit.plugins.describe import Change, Description, describe
from smallvit.plugins.distillation import add_distillation_token, set_distilled_training
from smallvit.plugins.locality import Locality, LocalitySelfAttention, set_fused_attention, set_openness, temperatures
from smallvit.plugins.lsa import LSAConfig, locality_attention
from smallvit.plugins.patching import UnsupportedModelError, patch, unpatch
from smallvit.plugins.resize import set_input_size
from smallvit.plugins.spt import ShiftedPatchTokenization, SPTConfig
from smallvit.plugins.weights import LoadReport, load_base

__all__ = [
    "BinaryConfig",
    "Change",
    "Description",
    "LSAConfig",
    "LoadReport",
    "Locality",
    "LocalitySelfAttention",
    "SPTConfig",
    "ShiftedPatchTokenization",
    "UnsupportedModelError",
    "add_distillation_token",
    "describe",
    "load_base",
    "locality_attention",
    "pack",
    "patch",
    "set_distilled_training",
    "set_fused_attention",
    "set_input_size",
    "set_openness",
    "temperatures",
    "unpatch",
]
