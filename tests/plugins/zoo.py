"""Build a small instance of every class and feature of timm's that the plugins meet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import ClassifierHead
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.gcvit import GlobalContextVit
from timm.models.hieradet_sam2 import HieraDet
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.nextvit import NextViT
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vitamin import VitCfg, VitConvCfg
from timm.models.volo import VOLO
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Builder = Callable[[], nn.Module]

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
WIDE = VIT | {"embed_dim": 48}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
PYRAMID = {"depths": (1,) * 4, "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
LEVIT = {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
NARROW = {"width_list": [8, 8, 8, 16, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": (16, 16)}
FAST = {"layers": (1,) * 4, "embed_dims": (32,) * 4}
MAX = {"img_size": 64, "embed_dim": (32,) * 4, "depths": (1,) * 4}


def _named(name: str, **arguments: Any) -> Builder:
    return lambda: timm.create_model(name, num_classes=5, **arguments)


def _built(cls: type[nn.Module], *positional: Any, **arguments: Any) -> Builder:
    return lambda: cls(*positional, num_classes=5, **arguments)


def _mvit(**arguments: Any) -> Builder:
    cfg = MultiScaleVitCfg(depths=(1, 2, 2), embed_dim=8, stride_q=((1, 1), (2, 2), (2, 2)), **arguments)
    return _built(MultiScaleVit, cfg, img_size=(32, 32))


def _bottleneck_net() -> nn.Module:
    blocks = tuple(ByoBlockCfg(type="self_attn", d=1, c=32, s=stride, gs=0, br=0.5) for stride in (2, 1))
    cfg = ByoModelCfg(blocks=blocks, stem_chs=16, stem_pool="", fixed_input_size=True, self_attn_layer="bottleneck")
    return ByobNet(cfg, num_classes=5, img_size=16)


def _mobilevit() -> nn.Module:
    transformer = {"transformer_dim": 16, "transformer_depth": 1, "patch_size": 2}
    blocks = (ByoBlockCfg(type="mobilevit", d=1, c=16, s=1, gs=1, br=1.0, block_kwargs=transformer),) * 2
    return ByobNet(ByoModelCfg(blocks=blocks, stem_chs=16, stem_pool="", downsample=""), num_classes=5)


def _nextvit() -> nn.Module:
    """NextViT's first two stages, since the widths of the others are fixed and large."""
    model = NextViT(3, num_classes=5, stem_chs=(8, 8, 8), depths=(1, 1, 5, 1), sr_ratios=(1, 1, 1, 1))
    model.stages = model.stages[:2]
    model.norm = nn.BatchNorm2d(256)
    model.head = ClassifierHead(256, 5)
    return model


def _vitamin() -> nn.Module:
    stem = VitCfg((8, 8, 24), (1, 1, 1), 8, VitConvCfg(norm_layer="layernorm2d"), head_type="1d")
    return _named("vitamin_small_224", img_size=64, embed_dim=24, depth=1, num_heads=3, embed_cfg=stem)()


ZOO: dict[str, tuple[Builder, int]] = {
    # VisionTransformer and its features
    "vit": (_named("vit_tiny_patch16_224", **VIT), 16),
    "vit average pool": (_named("vit_tiny_patch16_224", **VIT, global_pool="avg", class_token=False), 16),
    "vit attention pool": (_named("vit_tiny_patch16_224", **VIT, global_pool="map", class_token=False), 16),
    "vit registers": (_named("vit_tiny_patch16_224", **VIT, reg_tokens=2), 16),
    "vit qk-norm": (_named("vit_tiny_patch16_224", **VIT, qk_norm=True), 16),
    "vit layer scale": (_named("vit_tiny_patch16_224", **VIT, init_values=1e-5), 16),
    "vit pre-norm": (_named("vit_base_patch32_clip_224", **VIT), 16),
    "vit parallel things": (_named("vit_small_patch16_18x2_224", **VIT), 16),
    "vit parallel scaling": (_named("vit_tiny_patch16_224", **VIT, block_fn=ParallelScalingBlock), 16),
    "vit differential": (_named("vit_tiny_patch16_224", **WIDE, attn_layer="diff"), 16),
    "vit differential block": (_named("vit_tiny_patch16_224", **WIDE, block_fn=DiffParallelScalingBlock), 16),
    "vit dynamic size": (_named("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), 16),
    "vit post-norm": (_named("vit_relpos_base_patch32_plus_rpn_256", **VIT), 16),
    "vit relpos": (_named("vit_relpos_small_patch16_224", **VIT), 16),
    "vit relpos, class token": (_named("vit_relpos_base_patch16_cls_224", **VIT), 16),
    "vit srelpos": (_named("vit_srelpos_small_patch16_224", **VIT), 16),
    "vit hybrid": (_named("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=24, depth=1, num_heads=3), 64),
    "vit sam": (_named("samvit_base_patch16", **VIT, window_size=2, global_attn_indexes=(1,), neck_chans=16), 16),
    "deit": (_named("deit_tiny_patch16_224", **VIT), 16),
    "deit distilled": (_named("deit_tiny_distilled_patch16_224", **VIT), 16),
    "deit3": (_named("deit3_small_patch16_224", **VIT), 16),
    # The paper's other families
    "cait": (_named("cait_xxs24_224", **VIT, depth_token_only=1), 16),
    "pit": (_named("pit_ti_224", img_size=20, patch_size=4, stride=2, base_dims=(8,) * 3, depth=(1,) * 3), 20),
    "pit distilled": (
        _named("pit_ti_distilled_224", img_size=16, patch_size=2, stride=2, base_dims=(8,) * 3, depth=(1,) * 3),
        16,
    ),
    "swin": (_named("swin_tiny_patch4_window7_224", **SWIN), 32),
    "swin odd": (
        _named(
            "swin_tiny_patch4_window7_224",
            **SWIN | {"img_size": 20, "patch_size": 4, "window_size": 3},
            always_partition=True,
        ),
        20,
    ),
    "swin to one token": (
        _named(
            "swin_tiny_patch4_window7_224",
            **SWIN | {"img_size": 16, "patch_size": 4, "window_size": 2, "depths": (2, 1, 1), "num_heads": (2, 2, 3)},
        ),
        16,
    ),
    "swin v2": (_named("swinv2_tiny_window8_256", **SWIN), 32),
    "swin v2 cr": (_named("swinv2_cr_tiny_ns_224", **SWIN), 32),
    # Relative and rotary positions
    "beit": (_named("beit_base_patch16_224", **VIT), 16),
    "beit, shared positions": (
        _named("beitv2_base_patch16_224", **VIT, use_shared_rel_pos_bias=True, use_rel_pos_bias=False),
        16,
    ),
    "eva": (_named("eva_giant_patch14_224", **VIT), 16),
    "eva-02": (_named("eva02_tiny_patch14_224", **WIDE), 16),
    "dinov3": (_named("vit_small_patch16_dinov3", **WIDE), 16),
    "rope mixed": (_named("vit_small_patch16_rope_mixed_224", **WIDE), 16),
    "naflexvit": (_named("naflexvit_base_patch16_gap", embed_dim=24, depth=1, num_heads=3), 64),
    # Pyramids, windows and hybrids
    "caformer": (
        _built(
            MetaFormer,
            depths=(1,) * 4,
            dims=(8, 8, 32, 64),
            token_mixers=[SepConv, SepConv, Attention, Attention],
            norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        ),
        64,
    ),
    "coat": (
        _named("coat_tiny", img_size=64, embed_dims=(8,) * 4, serial_depths=(1,) * 4, parallel_depth=1, num_heads=8),
        64,
    ),
    "coatnet": (_named("coatnet_nano_rw_224", **MAX), 64),
    "convit": (
        _named("convit_tiny", img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=3, local_up_to_layer=1),
        32,
    ),
    "crossvit": (
        _named("crossvit_tiny_240", img_size=48, embed_dim=[12, 24], depth=[[1, 1, 0]], img_scale=(1.0, 2 / 3)),
        48,
    ),
    "davit": (_named("davit_tiny", depths=(1,) * 4, embed_dims=(8, 8, 16, 16), num_heads=(2,) * 4), 64),
    "efficientformer": (_named("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(8, 8, 16, 16)), 224),
    "efficientformer v2": (
        _named("efficientformerv2_s0", img_size=64, embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 2)),
        64,
    ),
    "efficientvit msra": (
        _named(
            "efficientvit_m0",
            img_size=64,
            embed_dim=(16,) * 3,
            key_dim=(4,) * 3,
            num_heads=(2,) * 3,
            depth=(1,) * 3,
            window_size=(4, 2, 2),
        ),
        64,
    ),
    "fastvit": (_named("fastvit_sa12", **FAST), 64),
    "gcvit": (
        _built(
            GlobalContextVit,
            img_size=64,
            window_size=(4, 4, 4, 2),
            embed_dim=8,
            depths=(1, 1, 2, 2),
            num_heads=(1, 1, 2, 2),
        ),
        64,
    ),
    "hiera": (_named("hiera_tiny_224", img_size=64, embed_dim=8, stages=(1, 1, 2, 1)), 64),
    "hiera det": (
        _built(
            HieraDet,
            embed_dim=8,
            num_heads=2,
            stages=(1, 2, 2, 1),
            window_spec=(4, 2, 4, 2),
            global_att_blocks=(4,),
            global_pos_size=(4, 4),
        ),
        64,
    ),
    "levit": (_named("levit_128s", **LEVIT), 64),
    "levit conv": (_named("levit_conv_128s", **LEVIT), 64),
    "maxvit": (_named("maxvit_tiny_tf_224", **MAX), 64),
    "mvit v2": (_mvit(), 32),
    "mvit v2, class token": (_mvit(use_cls_token=True, use_abs_pos=True), 32),
    "nest": (_built(Nest, img_size=32, num_levels=2, embed_dims=(12, 24), num_heads=(2, 3), depths=(1, 1)), 32),
    "nextvit": (_nextvit, 32),
    "pvt v2": (_named("pvt_v2_b0", **PYRAMID), 64),
    "pvt v2 linear": (_named("pvt_v2_b2_li", **PYRAMID), 64),
    "shvit": (
        _named("shvit_s1", embed_dim=(16, 24, 32), partial_dim=(8, 8, 8), depth=(1, 1, 1), types=("i", "s", "s")),
        128,
    ),
    "tiny vit": (_named("tiny_vit_5m_224", depths=(1,) * 4, embed_dims=(32,) * 4, num_heads=(2,) * 4), 64),
    "tnt": (_named("tnt_s_patch16_224", img_size=32, embed_dim=24, depth=1, inner_dim=8, num_heads_inner=2), 32),
    "twins pcpvt": (_named("twins_pcpvt_small", **PYRAMID, img_size=64), 64),
    "twins svt": (_named("twins_svt_small", img_size=64, depths=(2,) * 4, embed_dims=(16,) * 4), 64),
    "visformer": (
        _named("visformer_tiny", img_size=64, depth=(1, 1, 1), embed_dim=32, init_channels=8, num_heads=2),
        64,
    ),
    "vitamin": (_vitamin, 64),
    "volo": (
        _built(
            VOLO,
            [1, 1, 1],
            img_size=32,
            stem_hidden_dim=8,
            embed_dims=[12, 24, 24],
            num_heads=[2, 3, 3],
            downsamples=(True, False, False),
            outlook_attention=(True, False, False),
        ),
        32,
    ),
    "botnet": (_bottleneck_net, 16),
    "mobilevit": (_mobilevit, 32),
    # No tokens, or no scores between them
    "mixer": (_built(MlpMixer, img_size=16, patch_size=4, num_blocks=1, embed_dim=24), 16),
    "xcit": (_named("xcit_nano_12_p16_224", img_size=64, depth=1, embed_dim=24), 64),
    "resnet": (_named("test_resnet"), 32),
}
"""How each model is built, and the image size it takes."""

LATER: dict[str, tuple[str, dict[str, Any], int]] = {
    "lowformer": ("lowformer_b0", NARROW, 64),
    "cpubone": ("cpubone_nano", NARROW, 64),
    "cpubone, transposed": ("cpubone_b1_dwnorm", NARROW, 64),
    "gemma4": (
        "gemma4_vit_167m",
        VIT | {"img_size": 12, "head_dim": 8, "intermediate_size": 32, "position_embedding_size": 64},
        12,
    ),
    "deepseek": ("deepseek_vit_412m", VIT, 16),
    "qwen3": ("qwen3_vit_88m", VIT, 16),
}
"""What only later versions of timm have: name, arguments, image size."""

ZOO |= {key: (_named(name, **more), size) for key, (name, more, size) in LATER.items() if timm.is_model(name)}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model of the zoo in eval mode with noise on all weights, so that zero tables, scales and gates matter.

    Its batch norms have the statistics of random images.
    """
    return copy.deepcopy(_built_once(name, seed))


@cache
@torch.no_grad()
def _built_once(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = shaken(ZOO[name][0]())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(torch.randn(4, *images(name).shape[1:]))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def shaken(module: nn.Module) -> nn.Module:
    """Add noise to every weight of a module, of a size that keeps the scale of activations."""
    for parameter in module.parameters():
        spread = 0.2 if parameter.ndim < 2 else min(0.2, parameter[0].numel() ** -0.5)
        parameter.add_(torch.randn_like(parameter), alpha=spread)
    return module


def images(name: str, batch: int = 2) -> Tensor:
    """Random images of the size that a model takes."""
    size = ZOO[name][1]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
