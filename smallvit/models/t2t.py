"""Tokens-to-token ViT: overlapping patches are unfolded and mixed by attention, repeatedly; then a ViT follows.

    z = U(x),    q, k, v = LN(z) W,    t = v + softmax(q kᵀ / √w) v Wₒ,    x ← t + MLP(LN(t))

where U collects 3×3 neighborhoods with stride 2, w values each (27, then 576; 135 with SPT). LN and a linear layer
project the last U to the ViT's width. Source: Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986, in the small
form of Lee, Lee, Song 2021, arXiv:2112.13492: one head of 64 and an MLP of 64 between unfolds, then 12 blocks of width
256, 4 heads, MLP ratio 2, no bias on q, k, v, a class token and fixed sinusoidal position embeddings.

Differences from the official code of Lee et al.: a block of the ViT has one residual around attention,
x + attn(LN(x)), without a second one of LN(x) inside; the last LayerNorm, which the official code creates but never
calls, is applied. Differences from Yuan et al.: the first unfold is 3×3 with stride 2 like the others, and a LayerNorm
precedes the linear projection.

Axes: b batch, c channels, h w image, i j token grid, n tokens, e token width, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention, Mlp, calculate_drop_path_rates, global_pool_nlc, to_2tuple
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smallvit.plugins.lsa_layer import Locality
from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_layer import Views
from smallvit.utils.errors import InputError

KERNEL, STRIDE = 3, 2
TOKEN_DIM = 64
"""Width between unfolds."""


class T2TViT(nn.Module):
    """Tokens-to-token ViT with the attributes and methods of timm's models.

    Position embeddings are fixed, so that images of any size are accepted, not only `img_size`.

    Args:
        patch_size: Pixels per token and side, a power of 2; each unfold halves the image once.
        drop_path_rate: Stochastic depth of the last block; it grows from 0.

    Raises:
        InputError: `patch_size` is not a power of 2, or is 1.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        unfolds = patch_size.bit_length() - 1
        if patch_size != 2**unfolds or unfolds < 1:
            use = "2" if patch_size < 2 else f"{2**unfolds} or {2 ** (unfolds + 1)}"
            raise InputError(f"--patch-size {patch_size}: t2t expects a power of 2, at least 2; use {use}")
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        dims = [in_chans] + [TOKEN_DIM] * (unfolds - 1)
        self.tokens = nn.Sequential(
            *[TokenTransformer(dim, TOKEN_DIM) for dim in dims[:-1]], TokenProjection(dims[-1], embed_dim)
        )
        self.tokens[0].cuts_images = True  # the module that SPT changes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", torch.empty(1, self._num_tokens(), embed_dim), persistent=False)
        self.init_non_persistent_buffers()
        self.blocks = nn.Sequential(
            *[
                Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
                for rate in calculate_drop_path_rates(drop_path_rate, depth)
            ]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Draw linear weights and the class token from a truncated normal of std 0.02; set biases to 0."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def init_non_persistent_buffers(self) -> None:
        """Fill the position embeddings, which are not saved in checkpoints."""
        self.pos_embed.copy_(sincos_1d(self._num_tokens(), self.embed_dim))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size that the position embeddings are computed for."""
        self.img_size = to_2tuple(img_size)
        self.pos_embed = self.pos_embed.new_empty(1, self._num_tokens(), self.embed_dim)
        self.init_non_persistent_buffers()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens of an image of `img_size`."""
        rows, columns = (-(-side // STRIDE ** len(self.tokens)) for side in self.img_size)
        return rows, columns

    def _num_tokens(self) -> int:
        rows, columns = self.grid_size
        return 1 + rows * columns

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of the parameters' names, from the stem to the head."""
        return {"stem": r"^cls_token|^tokens", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes`, or remove it for 0.

        `global_pool` is token, avg, max or '' (no pooling); None keeps it.
        """
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.cls_token.device, self.cls_token.dtype).train(self.training)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """Return the tokens after the last norm, the class token first."""
        return self.forward_intermediates(x, [])[0]

    def forward_intermediates(
        self, x: Float[Tensor, "b c h w"], indices: Sequence[int] | None = None, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the tokens after the last norm, and the patch tokens after all blocks or some as maps (b, e, i, j).

        Only the maps are returned with `intermediates_only`.
        """
        x = self._run(self.tokens, x)
        rows, selected = x.shape[2], range(len(self.blocks)) if indices is None else indices
        count = 1 + x.shape[2] * x.shape[3]
        pos_embed = self.pos_embed
        if count > pos_embed.shape[1]:
            pos_embed = sincos_1d(count, self.embed_dim).to(pos_embed)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), rearrange(x, "b e i j -> b (i j) e")], dim=1)
        x, maps = x + pos_embed[:, :count], []
        for index in range(len(self.blocks)):
            x = self._run(self.blocks[index : index + 1], x)
            if index in selected:
                maps.append(rearrange(x[:, 1:], "b (i j) e -> b e i j", i=rows))
        return maps if intermediates_only else (self.norm(x), maps)

    def forward_head(self, x: Float[Tensor, "b n e"], pre_logits: bool = False) -> Tensor:
        """Return the logits (b, num_classes) of tokens, or the pooled features (b, e) with `pre_logits`."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        return x if pre_logits else self.head(x)

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(layers, x) if self.grad_checkpointing else layers(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))


class TokenTransformer(nn.Module):
    """Unfold, then apply one narrow transformer block; maps (b, in_chans, h, w) to (b, dim, ⌈h/2⌉, ⌈w/2⌉)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        width = in_chans * KERNEL**2
        self.unfold = Unfold()
        self.norm1 = nn.LayerNorm(width)
        self.attn = TokenAttention(width, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        x = self.unfold(x)
        rows = x.shape[2]
        x = self.attn(self.norm1(rearrange(x, "b c i j -> b (i j) c")))
        x = x + self.mlp(self.norm2(x))
        return rearrange(x, "b (i j) e -> b e i j", i=rows)

    def shifted_leaves(self, config: SPTConfig) -> dict[str, nn.Module]:
        """Return the leaf modules that SPT replaces, by name."""
        unfold, width = shifted_unfold(self.norm1, config)
        return {"unfold": unfold, "norm1": nn.LayerNorm(width), "attn.qkv": widen(self.attn.qkv, width)}


class TokenProjection(nn.Module):
    """Unfold, then project to the ViT's width; maps (b, in_chans, h, w) to (b, dim, ⌈h/2⌉, ⌈w/2⌉)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        width = in_chans * KERNEL**2
        self.unfold = Unfold()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        x = rearrange(self.unfold(x), "b c i j -> b i j c")
        return rearrange(self.proj(self.norm(x)), "b i j e -> b e i j")

    def shifted_leaves(self, config: SPTConfig) -> dict[str, nn.Module]:
        """Return the leaf modules that SPT replaces, by name."""
        unfold, width = shifted_unfold(self.norm, config)
        return {"unfold": unfold, "norm": nn.LayerNorm(width), "proj": widen(self.proj, width)}


class Unfold(nn.Module):
    """Collect 3×3 neighborhoods with stride 2 and zero padding; maps (b, c, h, w) to (b, 9c, ⌈h/2⌉, ⌈w/2⌉)."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 9c i j"]:
        values = F.unfold(x, KERNEL, padding=KERNEL // 2, stride=STRIDE)
        return values.unflatten(2, [-(-side // STRIDE) for side in x.shape[2:]])


class ShiftedUnfold(Unfold):
    """Unfold an image and v - 1 copies shifted by one pixel, concatenated: (b, c, h, w) to (b, 9vc, i, j)."""

    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        self.views = Views((STRIDE, STRIDE), config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 9vc i j"]:
        return super().forward(self.views.images(x))


class TokenAttention(Attention):
    """Map tokens (b, n, dim) to narrower ones (b, n, dim_out) by attention; the values are the residual.

    The softmax scale is that of the incoming width, dim^-0.5, as in the official code.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, num_heads=1, attn_head_dim=dim_out, dim_out=dim_out, qkv_bias=False)

    @property
    def scale(self) -> float:
        """Return the softmax scale, which follows the width when SPT widens the tokens."""
        return self.qkv.in_features**-0.5

    @scale.setter
    def scale(self, value: float) -> None:
        """Ignore the scale of the head width, which timm's constructor assigns."""

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            scale = self.qkv.in_features**-0.5  # not `self.scale`: a tensor with LSA, which the kernel does not take
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            y = self.attn_drop(scores.softmax(dim=-1)) @ v
        y, values = (rearrange(heads, "b h n d -> b n (h d)") for heads in (y, v))
        return values + self.proj_drop(self.proj(y))


class LocalTokenAttention(Locality, TokenAttention):
    """`TokenAttention` with LSA."""

    constant = TokenAttention.scale
    added = Locality.added[:-1]  # without this property


def sincos_1d(count: int, width: int) -> Float[Tensor, "1 count width"]:
    """Return fixed position embeddings: sin(p / 10000^(2k/width)) in channel 2k of position p, the cosine in 2k + 1."""
    channel = torch.arange(width, device="cpu")
    frequency = 10_000.0 ** (-2 * (channel // 2).double() / width)
    angle = torch.arange(count, device="cpu")[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def init_linear(layer: nn.Linear) -> None:
    """Draw weights from a truncated normal of std 0.02 and set the bias to 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def shifted_unfold(norm: nn.LayerNorm, config: SPTConfig) -> tuple[ShiftedUnfold, int]:
    """Return the unfold of shifted images, and the width of its tokens, which `norm` normalizes without SPT."""
    unfold = ShiftedUnfold(config)
    return unfold, norm.normalized_shape[0] * unfold.views.count


def widen(layer: nn.Linear, in_features: int) -> nn.Linear:
    """Return a new layer of the same outputs for wider tokens, initialized as T2T's layers are."""
    new = nn.Linear(in_features, layer.out_features, layer.bias is not None)
    init_linear(new)
    return new
