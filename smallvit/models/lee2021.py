"""Build the five architectures of Lee, Lee, Song 2021 (arXiv:2112.13492), without the paper's two plugins.

The models are timm's classes with the paper's sizes and initialization. Where a timm class has no argument for a
difference, one leaf module is replaced by a subclass: attention whose heads together are wider than the tokens (CaiT),
pooling followed by a 1×1 convolution (PiT), learned absolute position embeddings (Swin). T2T-ViT is in `t2t`.

Parameter counts and initialization equal the official code's; docs/models.md compares multiply-accumulates.

Differences from the official code: LayerNorm's eps in ViT, CaiT and PiT, the mask of CaiT's LSA, weight decay; the same
page describes them. Differences from CaiT (arXiv:2103.17239): class attention reads the patches only and mixes its
heads too; class blocks have stochastic depth like the others. Differences from PiT (arXiv:2103.16302): patches do not
overlap, and the class token has a position embedding.

Axes: b batch, h heads, n queries, m keys, d head width, c token width, i j token grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed_nhwc
from timm.models.cait import Cait, ClassAttn, TalkingHeadAttn
from timm.models.pit import Pooling, PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smallvit.plugins.lsa_layer import Locality
from smallvit.plugins.lsa_timm import talking_heads
from smallvit.plugins.sdpa import attend_talking
from smallvit.plugins.spt import SPT

VIT = {"embed_dim": 192, "depth": 9, "num_heads": 12, "mlp_ratio": 2.0, "qkv_bias": False}
CAIT = {"embed_dim": 192, "depth": 24, "num_heads": 4, "mlp_ratio": 2.0, "mlp_ratio_token_only": 2.0, "qkv_bias": False}
CAIT_HEAD_DIM = 64
CAIT_INIT_VALUES = (0.1,) * 18 + (1e-5,) * 6
"""Initial LayerScale of each block in the official code; the class blocks start at the first value."""
PIT = {"base_dims": (48, 48, 48), "depth": (2, 6, 4), "heads": (2, 4, 8), "mlp_ratio": 2.0}
SWIN = {"embed_dim": 96, "depths": (2, 6, 4), "num_heads": (3, 6, 12), "mlp_ratio": 2.0, "window_size": 4}

ImageSize = int | tuple[int, int]


class TalkingHeads(TalkingHeadAttn):
    """Talking-heads attention whose head width does not depend on `dim`; maps tokens (b, n, dim) to (b, n, dim)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int = CAIT_HEAD_DIM, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        attn_dim = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.qkv = linear_like(self.qkv, dim, 3 * attn_dim)
        self.proj = linear_like(self.proj, attn_dim, dim)
        self.proj_l.bias = self.proj_w.bias = None

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj_drop(self.proj(attend_mixed(self, q, k, v)))


class ClassTalkingHeads(ClassAttn):
    """Talking-heads attention of the class token to the patches; maps (b, 1 + m, dim) to (b, 1, dim)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int = CAIT_HEAD_DIM, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        attn_dim = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.fused_attn = False  # the fused kernel cannot mix heads
        self.q, self.k, self.v = (linear_like(layer, dim, attn_dim) for layer in (self.q, self.k, self.v))
        self.proj_l, self.proj_w = (linear_like(self.q, num_heads, num_heads) for _ in range(2))
        self.proj_l.bias = self.proj_w.bias = None
        self.proj = linear_like(self.proj, attn_dim, dim)

    def forward(self, x: Float[Tensor, "b 1+m c"]) -> Float[Tensor, "b 1 c"]:
        flat = self.q(x[:, :1]), self.k(x[:, 1:]), self.v(x[:, 1:])
        q, k, v = (rearrange(tokens, "b n (h d) -> b h n d", h=self.num_heads) for tokens in flat)
        return self.proj_drop(self.proj(attend_mixed(self, q, k, v)))


class LocalTalkingHeads(Locality, TalkingHeads):
    """`TalkingHeads` with LSA."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return talking_heads(self, x)


class LocalClassTalkingHeads(Locality, ClassTalkingHeads):
    """`ClassTalkingHeads` with LSA: a learned temperature as in the official code; there is no diagonal to mask."""

    has_diagonal = False


def linear_like(layer: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """Return a new linear layer of another size, with `layer`'s device and dtype, and a bias if it has one."""
    weight = layer.weight
    return nn.Linear(in_features, out_features, layer.bias is not None, device=weight.device, dtype=weight.dtype)


def attend_mixed(
    layer: TalkingHeads | ClassTalkingHeads,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
) -> Float[Tensor, "b n hd"]:
    """Compute a layer's talking-heads attention and concatenate the heads."""
    y = attend_talking(q * layer.scale, k, v, layer.proj_l, layer.proj_w, layer.attn_drop)
    return rearrange(y, "b h n d -> b n (h d)")


class ClassTokenNorm(nn.LayerNorm):
    """Normalize the class token only; maps tokens (b, 1 + m, dim) to (b, 1 + m, dim).

    Source: the official code, whose class attention takes keys and values from patches that are not normalized.
    """

    def forward(self, x: Float[Tensor, "b 1+m c"]) -> Float[Tensor, "b 1+m c"]:
        return torch.cat([super().forward(x[:, :1]), x[:, 1:]], dim=1)


class PointwisePooling(Pooling):
    """PiT's strided depthwise convolution followed by a 1×1 convolution; the class token has a linear layer."""

    def __init__(self, in_feature: int, out_feature: int, stride: int = 2) -> None:
        super().__init__(in_feature, out_feature, stride)
        self.pointwise = nn.Conv2d(out_feature, out_feature, kernel_size=1)

    def forward(
        self, x: Float[Tensor, "b c i j"], cls_token: Float[Tensor, "b 1 c"]
    ) -> tuple[Float[Tensor, "b 2c i2 j2"], Float[Tensor, "b 1 2c"]]:
        x, cls_token = super().forward(x, cls_token)
        return self.pointwise(x), cls_token


class ClassPosEmbed(nn.Module):
    """Add the learned position embedding of PiT's class token; replaces the first stage's (empty) pooling."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(dim))  # one axis, so that timm excludes it from weight decay

    def forward(
        self, x: Float[Tensor, "b c i j"], cls_token: Float[Tensor, "b 1 c"]
    ) -> tuple[Float[Tensor, "b c i j"], Float[Tensor, "b 1 c"]]:
        return x, cls_token + self.pos_embed


class AbsPosPatchEmbed(PatchEmbed):
    """Patch embedding, channels last, plus learned absolute position embeddings, resampled for other grids."""

    def __init__(self, *, embed_dim: int, **kwargs: Any) -> None:
        super().__init__(embed_dim=embed_dim, **kwargs)
        self.pos_embed = nn.Parameter(self.proj.weight.new_empty(1, *self.grid_size, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j c"]:
        x = super().forward(x)
        return x + resample_abs_pos_embed_nhwc(self.pos_embed, list(x.shape[1:3]))

    def set_input_size(self, img_size: ImageSize | None = None, patch_size: ImageSize | None = None) -> None:
        """Change the image or patch size and resample the position embeddings bicubically."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), list(self.grid_size))
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)


class AbsPosSwin(SwinTransformer):
    """Swin with the official code's initialization, and no weight decay on the patch embedding's positions."""

    def initialize_linears(self, module: nn.Module) -> None:
        """Give the linear layers in a module torch's default initialization, as the official Swin code does.

        `smallvit.patch` calls it for each layer that SPT adds.
        """
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        return super().no_weight_decay() | {"patch_embed.pos_embed"}


def vit(drop_path_rate: float = 0.0, **kwargs: Any) -> VisionTransformer:
    """Build ViT with the same stochastic depth rate in every block; `kwargs` override the paper's size."""
    model = VisionTransformer(**VIT | kwargs)
    set_drop_path(model.blocks, drop_path_rate)
    return init_weights(model)


def vit96(**kwargs: Any) -> VisionTransformer:
    """Build a small ViT for small images: 96 wide, 6 layers, 6 heads."""
    return vit(**{"embed_dim": 96, "depth": 6, "num_heads": 6} | kwargs)


def cait(drop_path_rate: float = 0.0, **kwargs: Any) -> Cait:
    """Build CaiT: 24 blocks of patches, then 2 blocks of class attention; talking heads in all of them."""
    attention = {"attn_block": TalkingHeads, "attn_block_token_only": ClassTalkingHeads}
    model = Cait(init_values=CAIT_INIT_VALUES[0], **attention, **CAIT | kwargs)
    init_weights(model)
    for block in (*model.blocks, *model.blocks_token_only):
        block.drop_path = DropPath(drop_path_rate)
        nn.init.normal_(block.attn.proj_l.weight)
        nn.init.normal_(block.attn.proj_w.weight)
    for block, init_value in zip(model.blocks, CAIT_INIT_VALUES, strict=True):
        nn.init.constant_(block.gamma_1, init_value)
        nn.init.constant_(block.gamma_2, init_value)
        q, k, v = block.attn.qkv.weight.chunk(3)
        xavier_normal_per_layer([q], [k, v])
    for block in model.blocks_token_only:
        block.norm1 = ClassTokenNorm(CAIT["embed_dim"], eps=block.norm1.eps)
        xavier_normal_per_layer([block.attn.k.weight, block.attn.v.weight])
    return model


def pit(drop_path_rate: float = 0.0, **kwargs: Any) -> PoolingVisionTransformer:
    """Build PiT: three stages of half the side and twice the width each; patches do not overlap."""
    model = PoolingVisionTransformer(stride=kwargs["patch_size"], **PIT | kwargs)
    model.transformers[0].pool = ClassPosEmbed(model.cls_token.shape[-1])
    for stage in model.transformers[1:]:
        stage.pool = PointwisePooling(stage.pool.conv.in_channels, stage.pool.conv.out_channels)
    for stage in model.transformers:
        set_drop_path(stage.blocks, drop_path_rate)
        for block in stage.blocks:
            block.attn.qkv.bias = None  # timm's stages have no argument for it
    return init_weights(model)


def swin(**kwargs: Any) -> SwinTransformer:
    """Build Swin: three stages of 4×4-token windows; stochastic depth grows from 0 to `drop_path_rate`."""
    model = AbsPosSwin(embed_layer=AbsPosPatchEmbed, **SWIN | kwargs)
    model.initialize_linears(model)
    return model


def xavier_normal_per_layer(*layers: list[Tensor]) -> None:
    """Initialize weights (out, in) Xavier-normal, each list as if its weights were the rows of one linear layer."""
    for weights in layers:
        fans = weights[0].shape[1] + sum(len(weight) for weight in weights)
        for weight in weights:
            nn.init.normal_(weight.detach(), std=(2 / fans) ** 0.5)


def set_drop_path(blocks: Iterable[nn.Module], rate: float) -> None:
    """Set the same stochastic depth rate in all blocks; timm's own argument makes it grow from 0."""
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def init_weights(model: nn.Module) -> nn.Module:
    """Initialize linear and convolution weights Xavier-normal, tokens and positions N(0, 1), as the official code does.

    A patch embedding counts as the linear layer of flattened patches that it is there.
    """
    patches = model.patch_embed.proj if isinstance(model.patch_embed, PatchEmbed) else None
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach()
            nn.init.xavier_normal_(weight.flatten(1) if module is patches else weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token)
    nn.init.normal_(model.pos_embed)
    return model


CITATION = SPT.citation
