"""The five architectures of Lee, Lee, Song 2021 (arXiv:2112.13492), without the paper's two plugins.

They are timm's classes, with the paper's sizes and initial values. Where a class of timm's cannot say what the paper
has, a leaf module is replaced by a class derived from it: attention whose heads are together wider than the tokens
(CaiT), pooling with a 1×1 convolution behind (PiT), learnt absolute positions (Swin). T2T has its own file.

Parameters are as many as the official code has; docs/models.md compares multiply-accumulates.

Differs from the official code: CaiT's LayerScale starts at CaiT's value for the depth of the model, not at another one
for each layer; T2T's attention has no residual within the residual; a mask of -1e-9, which hides nothing in the
official CaiT with LSA, is not repeated. Tokens, positions and vectors are kept out of weight decay, as timm has it.
Differs from CaiT (arXiv:2103.17239): class attention sees the patches alone and mixes its heads too, and class blocks
drop paths like all others. Differs from PiT (arXiv:2103.16302): patches do not overlap, and the class token has a
position.

Axes: b batch, h heads, n queries, m keys, d head width, c token width, i j token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

from smallvit.errors import InputError
from smallvit.plugins.attend import attend_talking
from smallvit.plugins.locality import Locality
from smallvit.plugins.lsa_timm import talking_heads
from smallvit.t2t import T2TViT

VIT = {"embed_dim": 192, "depth": 9, "num_heads": 12, "mlp_ratio": 2.0, "qkv_bias": False}
CAIT = {"embed_dim": 192, "depth": 24, "num_heads": 4, "mlp_ratio": 2.0, "mlp_ratio_token_only": 2.0, "qkv_bias": False}
CAIT_HEAD_DIM = 64
CAIT_LAYER_SCALE = 1e-5
"""CaiT's initial LayerScale for 19 to 24 layers."""
PIT = {"base_dims": (48, 48, 48), "depth": (2, 6, 4), "heads": (2, 4, 8), "mlp_ratio": 2.0}
SWIN = {"embed_dim": 96, "depths": (2, 6, 4), "num_heads": (3, 6, 12), "mlp_ratio": 2.0, "window_size": 4}

ImageSize = int | tuple[int, int]


class TalkingHeads(TalkingHeadAttn):
    """Talking-heads attention with heads of `head_dim`, whatever `dim` is; tokens (b, n, dim) to (b, n, dim)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int = CAIT_HEAD_DIM, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        width = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.qkv = resized(self.qkv, dim, 3 * width)
        self.proj = resized(self.proj, width, dim)
        self.proj_l.bias = self.proj_w.bias = None

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj_drop(self.proj(talk(self, q, k, v)))


class ClassTalkingHeads(ClassAttn):
    """Talking-heads attention of the class token to the patches; (b, 1 + m, dim) to (b, 1, dim)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int = CAIT_HEAD_DIM, **arguments: Any) -> None:
        super().__init__(dim, num_heads, **arguments)
        width = num_heads * head_dim
        self.scale = head_dim**-0.5
        self.fused_attn = False  # no kernel mixes heads
        self.q, self.k, self.v = (resized(layer, dim, width) for layer in (self.q, self.k, self.v))
        self.proj_l, self.proj_w = (resized(self.q, num_heads, num_heads) for _ in range(2))
        self.proj_l.bias = self.proj_w.bias = None
        self.proj = resized(self.proj, width, dim)

    def forward(self, x: Float[Tensor, "b 1+m c"]) -> Float[Tensor, "b 1 c"]:
        flat = self.q(x[:, :1]), self.k(x[:, 1:]), self.v(x[:, 1:])
        q, k, v = (rearrange(tokens, "b n (h d) -> b h n d", h=self.num_heads) for tokens in flat)
        return self.proj_drop(self.proj(talk(self, q, k, v)))


class LocalTalkingHeads(Locality, TalkingHeads):
    """Among patches, patched."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return talking_heads(self, x)


class LocalClassTalkingHeads(Locality, ClassTalkingHeads):
    """Of the class token, patched: a temperature, as in the official code; there is no diagonal."""

    has_diagonal = False


def resized(layer: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """A fresh layer of another size, with a bias where the first has one, of its device and dtype."""
    like = layer.weight
    return nn.Linear(in_features, out_features, layer.bias is not None, device=like.device, dtype=like.dtype)


def talk(
    layer: TalkingHeads | ClassTalkingHeads,
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
) -> Float[Tensor, "b n hd"]:
    """Attention with mixed heads, the heads side by side."""
    dropout = layer.attn_drop.p if layer.training else 0.0
    y = attend_talking(q * layer.scale, k, v, layer.proj_l, layer.proj_w, dropout=dropout)
    return rearrange(y, "b h n d -> b n (h d)")


class PointwisePooling(Pooling):
    """PiT's strided depthwise convolution with a 1×1 convolution behind; the class token has a linear layer."""

    def __init__(self, in_feature: int, out_feature: int, stride: int = 2) -> None:
        super().__init__(in_feature, out_feature, stride)
        self.pointwise = nn.Conv2d(out_feature, out_feature, kernel_size=1)

    def forward(
        self, x: Float[Tensor, "b c i j"], cls_token: Float[Tensor, "b 1 c"]
    ) -> tuple[Float[Tensor, "b 2c i2 j2"], Float[Tensor, "b 1 2c"]]:
        x, cls_token = super().forward(x, cls_token)
        return self.pointwise(x), cls_token


class ClassPosition(nn.Module):
    """The class token's learnt position, in the place of the first stage's pooling."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(dim))  # a vector: timm's groups keep it out of weight decay

    def forward(
        self, x: Float[Tensor, "b c i j"], cls_token: Float[Tensor, "b 1 c"]
    ) -> tuple[Float[Tensor, "b c i j"], Float[Tensor, "b 1 c"]]:
        return x, cls_token + self.pos_embed


class PositionedPatchEmbed(PatchEmbed):
    """Patch embedding, channels last, plus learnt absolute positions; these are resampled for other grids."""

    def __init__(self, *, embed_dim: int, **arguments: Any) -> None:
        super().__init__(embed_dim=embed_dim, **arguments)
        self.pos_embed = nn.Parameter(self.proj.weight.new_empty(1, *self.grid_size, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i j c"]:
        x = super().forward(x)
        return x + resample_abs_pos_embed_nhwc(self.pos_embed, list(x.shape[1:3]))

    def set_input_size(self, img_size: ImageSize | None = None, patch_size: ImageSize | None = None) -> None:
        """Take images of another size, or cut other patches; the positions follow, bicubically."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_abs_pos_embed_nhwc(self.pos_embed.detach(), list(self.grid_size))
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)


class PositionedSwin(SwinTransformer):
    """timm's, but for the positions of its patch embedding, which are kept out of weight decay."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no weight decay should act on."""
        return super().no_weight_decay() | {"patch_embed.pos_embed"}


def vit(
    img_size: ImageSize,
    patch_size: int,
    num_classes: int,
    in_chans: int,
    drop_path: float,
    size: Mapping[str, Any] = VIT,
    **more: Any,
) -> VisionTransformer:
    """ViT with the same stochastic depth in every block, of the paper's `size` unless given; `more` goes to timm."""
    model = VisionTransformer(
        img_size=img_size, patch_size=patch_size, num_classes=num_classes, in_chans=in_chans, **size, **more
    )
    drop_paths(model.blocks, drop_path)
    return initialise(model)


def cait(img_size: ImageSize, patch_size: int, num_classes: int, in_chans: int, drop_path: float) -> Cait:
    """CaiT: 24 layers of patches alone, then 2 in which the class token attends to them; talking heads in all."""
    model = Cait(
        img_size=img_size,
        patch_size=patch_size,
        num_classes=num_classes,
        in_chans=in_chans,
        init_values=CAIT_LAYER_SCALE,
        attn_block=TalkingHeads,
        attn_block_token_only=ClassTalkingHeads,
        **CAIT,
    )
    initialise(model)
    for block in (*model.blocks, *model.blocks_token_only):
        block.drop_path = DropPath(drop_path)
        nn.init.normal_(block.attn.proj_l.weight)
        nn.init.normal_(block.attn.proj_w.weight)
    return model


def pit(
    img_size: ImageSize, patch_size: int, num_classes: int, in_chans: int, drop_path: float
) -> PoolingVisionTransformer:
    """PiT: three stages, each half the side and twice the width; patches that do not overlap."""
    model = PoolingVisionTransformer(
        img_size=img_size, patch_size=patch_size, stride=patch_size, num_classes=num_classes, in_chans=in_chans, **PIT
    )
    model.transformers[0].pool = ClassPosition(model.cls_token.shape[-1])
    for stage in model.transformers[1:]:
        stage.pool = PointwisePooling(stage.pool.conv.in_channels, stage.pool.conv.out_channels)
    for stage in model.transformers:
        drop_paths(stage.blocks, drop_path)
        for block in stage.blocks:
            block.attn.qkv.bias = None  # timm's stages always have one
    return initialise(model)


def swin(img_size: ImageSize, patch_size: int, num_classes: int, in_chans: int, drop_path: float) -> SwinTransformer:
    """Swin: three stages of windows of 4×4 tokens; stochastic depth grows from 0 to `drop_path`."""
    return PositionedSwin(
        img_size=img_size,
        patch_size=patch_size,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path,
        embed_layer=PositionedPatchEmbed,
        **SWIN,
    )


def t2t(img_size: ImageSize, patch_size: int, num_classes: int, in_chans: int, drop_path: float) -> T2TViT:
    """T2T-ViT whose unfolds make one token of `patch_size`² pixels; stochastic depth grows from 0 to `drop_path`.

    Raises:
        InputError: `patch_size` is no power of 2, or 1.
    """
    unfolds = patch_size.bit_length() - 1
    if patch_size != 2**unfolds or unfolds < 1:
        use = "2" if patch_size < 2 else f"{2**unfolds} or {2 ** (unfolds + 1)}"
        raise InputError(f"--patch-size {patch_size}: t2t halves the image step by step; use {use}")
    return T2TViT(img_size, unfolds, in_chans, num_classes, drop_path_rate=drop_path)


def drop_paths(blocks: Iterable[nn.Module], rate: float) -> None:
    """The same stochastic depth in all blocks; timm's own argument lets it grow from 0."""
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def initialise(model: nn.Module) -> nn.Module:
    """The paper's initial values: Xavier-normal linear and convolution weights, N(0, 1) tokens and positions."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token)
    nn.init.normal_(model.pos_embed)
    return model


PUBLISHED: dict[str, Callable[..., nn.Module]] = {"vit": vit, "cait": cait, "pit": pit, "swin": swin, "t2t": t2t}
"""The paper's architectures by name, each of (img_size, patch_size, num_classes, in_chans, drop_path)."""
