"""Which models of timm the plugins can patch, found by patching each of them, on no device."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from timm.models import get_arch_name
from timm.models._registry import _model_to_module

from smallvit.plugins.patching import patch, patched_layers, sites, why_not

FAMILIES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "deit",
    "cait",
    "pit",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "beit",
    "byoanet",
    "cpubone",
    "csatv2",
    "lowformer",
    "eva",
    "maxxvit",
    "nest",
    "twins",
    "levit",
    "tnt",
    "crossvit",
    "coat",
    "convit",
    "davit",
    "deepseek_vit",
    "efficientformer",
    "efficientformer_v2",
    "efficientvit_msra",
    "fastvit",
    "gcvit",
    "gemma4_vit",
    "hiera",
    "hieradet_sam2",
    "metaformer",
    "mobilevit",
    "mvitv2",
    "naflexvit",
    "nextvit",
    "pvt_v2",
    "qwen3_vit",
    "shvit",
    "tiny_vit",
    "visformer",
    "vitamin",
    "volo",
    "xcit",
)
"""timm's modules of models that attend."""


@dataclass(frozen=True)
class Coverage:
    """What the plugins find in a model of timm's."""

    name: str
    family: str
    """timm's module."""
    changed: dict[str, int]
    """Layers that each plugin takes."""
    left: dict[str, int]
    """Layers that each plugin is meant for and cannot take."""
    reasons: dict[str, str]
    """Why a plugin takes none."""


def family(name: str) -> str:
    """The module of timm that a model is in."""
    return _model_to_module[get_arch_name(name)]


def names(pattern: str = "*", *, all_families: bool = False) -> list[str]:
    """Models of timm's whose name fits, in the families that attend, or in all."""
    return [name for name in timm.list_models(pattern) if all_families or family(name) in FAMILIES]


def survey(name: str) -> Coverage:
    """Patch a model of timm's with each plugin, as published, and look at what changed; its weights take no memory."""
    changed, left, reasons = {}, {}, {}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    for plugin in ("spt", "lsa"):
        if (reason := why_not(model, plugin)) is not None:
            reasons[plugin] = reason
        else:
            patch(model, **{plugin: True})
        changed[plugin] = sum(key == plugin for key, _, _ in patched_layers(model))
        left[plugin] = sum(site.plugin == plugin for site in sites(model))
    return Coverage(name, family(name), changed, left, reasons)
