"""Tokens-to-token ViT: overlapping patches are unfolded, mixed by attention and unfolded again, then a ViT follows.

    z = U(x),    q, k, v = LN(z) W,    t = v + softmax(q kᵀ / √d) v Wₒ,    x ← t + MLP(LN(t))

where U collects 3×3 neighbourhoods with stride 2; LN and a linear layer bring the last U to the ViT's width. Source:
Yuan et al. 2021, "Tokens-to-Token ViT", arXiv:2101.11986, in the small form of Lee, Lee, Song 2021,
arXiv:2112.13492: one head of 64 and an MLP of 64 between unfolds, then 12 layers 256 wide, 4 heads, MLP twice the
width, no bias on q, k, v, a class token and fixed sinusoidal positions.

Differs from the official code: a block of the ViT has one residual around attention, x + attn(LN(x)), not a second
one of LN(x) within. Differs from Yuan et al.: the first unfold is 3×3 with stride 2 like the others, and a LayerNorm
precedes the linear layer behind the last.

Axes: b batch, c channels, h w image, i j token grid, n tokens, e token width, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention, Mlp, global_pool_nlc, maybe_add_mask, resolve_self_attn_mask, to_2tuple
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smallvit.plugins.distillation import TwoHeads, new_head
from smallvit.plugins.locality import Locality
from smallvit.plugins.spt import SPTConfig, Views

KERNEL, STRIDE = 3, 2


def sinusoid(count: int, width: int) -> Float[Tensor, "1 count width"]:
    """Fixed positions: sin(p / 10000^(2k/width)) at channel 2k of position p, the cosine at channel 2k + 1."""
    channel = torch.arange(width, device="cpu")
    frequency = 10_000.0 ** (-2 * (channel // 2).double() / width)
    angle = torch.arange(count, device="cpu")[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class NeighbourhoodUnfold(nn.Module):
    """Maps (b, c, h, w) to the 3×3 neighbourhoods (b, 9c, ⌈h/2⌉, ⌈w/2⌉) of every second place, zeros around."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 9c i j"]:
        values = F.unfold(x, KERNEL, padding=KERNEL // 2, stride=STRIDE)
        return values.unflatten(2, [-(-side // STRIDE) for side in x.shape[2:]])


class TokenAttention(Attention):
    """Attention from tokens (b, n, dim) to narrower ones (b, n, dim_out); the values stand in for the residual."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, num_heads=1, attn_head_dim=dim_out, dim_out=dim_out, qkv_bias=False)

    def forward(
        self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n e"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = maybe_add_mask(scores, resolve_self_attn_mask(x.shape[1], scores, attn_mask, is_causal))
            y = self.attn_drop(scores.softmax(dim=-1)) @ v
        y, values = (rearrange(heads, "b h n d -> b n (h d)") for heads in (y, v))
        return values + self.proj_drop(self.proj(y))


class LocalTokenAttention(Locality, TokenAttention):
    """Attention between unfolds, patched."""


class ShiftedNeighbourhoods(NeighbourhoodUnfold):
    """The neighbourhoods of an image and of its views, shifted by a pixel: (b, c, h, w) to (b, 9vc, i, j)."""

    def __init__(self, config: SPTConfig) -> None:
        super().__init__()
        self.views = Views((STRIDE, STRIDE), config)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 9vc i j"]:
        return super().forward(self.views.images(x))


class TokenTransformer(nn.Module):
    """Unfold, then one narrow transformer layer: maps (b, in_chans, h, w) to (b, dim, ⌈h/2⌉, ⌈w/2⌉)."""

    cuts_images = False
    """Whether it is the first, where shifted patch tokenization belongs."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        width = in_chans * KERNEL**2
        self.unfold = NeighbourhoodUnfold()
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
        """The leaves for shifted images, without a norm of their own, as published."""
        unfold = ShiftedNeighbourhoods(config)
        width = self.norm1.normalized_shape[0] * unfold.views.count
        return {"unfold": unfold, "norm1": nn.LayerNorm(width), "attn.qkv": widened(self.attn.qkv, width)}


class TokenProjection(nn.Module):
    """The last unfold, brought to the ViT's width: maps (b, in_chans, h, w) to (b, dim, ⌈h/2⌉, ⌈w/2⌉)."""

    cuts_images = False
    """Whether it is the first, where shifted patch tokenization belongs."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        width = in_chans * KERNEL**2
        self.unfold = NeighbourhoodUnfold()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        x = rearrange(self.unfold(x), "b c i j -> b i j c")
        return rearrange(self.proj(self.norm(x)), "b i j e -> b e i j")

    def shifted_leaves(self, config: SPTConfig) -> dict[str, nn.Module]:
        """The leaves for shifted images, without a norm of their own, as published."""
        unfold = ShiftedNeighbourhoods(config)
        width = self.norm.normalized_shape[0] * unfold.views.count
        return {"unfold": unfold, "norm": nn.LayerNorm(width), "proj": widened(self.proj, width)}


def widened(layer: nn.Linear, in_features: int) -> nn.Linear:
    """A fresh layer for wider tokens, initialised as T2T's are."""
    new = nn.Linear(in_features, layer.out_features, layer.bias is not None)
    initialise_linear(new)
    return new


def initialise_linear(layer: nn.Linear) -> None:
    """Weights from a normal of 0.02, cut at ±2; biases 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class T2TViT(nn.Module):
    """Tokens-to-token ViT with the attributes and methods of timm's models.

    `unfolds` halvings of the image make the tokens, each but the last followed by a layer `token_dim` wide.
    `img_size` in pixels is what it is made for; images of any other size are taken too, as positions are fixed.
    `drop_path_rate` is the last block's, the first has 0.

    Raises:
        ValueError: `unfolds` is less than 1.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        unfolds: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 256,
        token_dim: int = 64,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if unfolds < 1:
            raise ValueError(f"unfolds {unfolds}: expected at least 1")
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        widths = [in_chans] + [token_dim] * (unfolds - 1)
        self.tokens = nn.Sequential(
            *[TokenTransformer(width, token_dim) for width in widths[:-1]], TokenProjection(widths[-1], embed_dim)
        )
        self.tokens[0].cuts_images = True
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", torch.empty(1, self._tokens(), embed_dim), persistent=False)
        self.init_non_persistent_buffers()
        self.blocks = nn.Sequential(
            *[
                Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
                for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
            ]
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": STRIDE**unfolds, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights and the class token from a normal of 0.02, cut at ±2; biases 0."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module)

    def init_non_persistent_buffers(self) -> None:
        """The positions, which no checkpoint holds."""
        self.pos_embed.copy_(sinusoid(self._tokens(), self.embed_dim))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """What the model is made for from now on; it takes other sizes too."""
        self.img_size = to_2tuple(img_size)
        self.pos_embed = sinusoid(self._tokens(), self.embed_dim).to(self.pos_embed)

    def _tokens(self) -> int:
        """Tokens of an image, the class token among them."""
        rows, columns = (-(-side // STRIDE ** len(self.tokens)) for side in self.img_size)
        return 1 + rows * columns

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no weight decay should act on."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names, from the stem to the head."""
        return {"stem": r"^cls_token|^tokens", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for `num_classes`; 0 for none. `global_pool` is token, avg, max or '' (unpooled)."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(self.cls_token.device, self.cls_token.dtype).train(self.training)

    def prefix(self) -> Float[Tensor, "1 p e"]:
        """What stands before the image's tokens, all at the first position."""
        return self.cls_token

    def positions(self, count: int) -> Float[Tensor, "1 count e"]:
        """Positions of the class token and of `count` - 1 others, from the buffer where it is long enough."""
        if count <= self.pos_embed.shape[1]:
            return self.pos_embed[:, :count]
        return sinusoid(count, self.embed_dim).to(self.pos_embed)

    def embed(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n e"], tuple[int, int]]:
        """The class token and the image's tokens with their positions, and the grid (i, j) of the latter."""
        x = self._run(self.tokens, x)
        grid = (x.shape[2], x.shape[3])
        positions = self.positions(1 + grid[0] * grid[1])
        first = (self.prefix() + positions[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, rearrange(x, "b e i j -> b (i j) e") + positions[:, 1:]], dim=1), grid

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(layers, x) if self.grad_checkpointing else layers(x)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n e"]:
        """Tokens after the last norm, the class token first."""
        x, _ = self.embed(x)
        return self.norm(self._run(self.blocks, x))

    def forward_head(self, x: Float[Tensor, "b n e"], pre_logits: bool = False) -> Tensor:
        """Logits (b, num_classes) of tokens, or with `pre_logits` the pooled tokens (b, e)."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        return x if pre_logits else self.head(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The final tokens and what chosen blocks give, as timm's `VisionTransformer.forward_intermediates`.

        `indices` are the blocks (the last n where an int, all where None). Features are (b, e, i, j), or (b, n, e)
        with `output_fmt` "NLC", after the last norm with `norm`; with `return_prefix_tokens` each is a pair with the
        class token (b, 1, e). `stop_early` leaves out the blocks behind, `intermediates_only` the final tokens.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r}: expected NCHW or NLC")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, (rows, _) = self.embed(x)
        features: list[Any] = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if index in taken:
                tokens = self.norm(x) if norm else x
                spatial = tokens[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    spatial = rearrange(spatial, "b (i j) e -> b e i j", i=rows).contiguous()
                features.append((spatial, tokens[:, : self.num_prefix_tokens]) if return_prefix_tokens else spatial)
        return features if intermediates_only else (self.norm(x), features)


class DistilledT2T(TwoHeads, T2TViT, plain=(T2TViT,)):
    """T2T-ViT with a distillation token, which shares the class token's position."""

    num_prefix_tokens = 2

    def add_token(self) -> None:
        self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty_like(self.cls_token), std=0.02))

    def prefix(self) -> Float[Tensor, "1 2 e"]:
        return torch.cat([self.cls_token, self.dist_token], dim=1)

    def head_drop(self, x: Tensor) -> Tensor:
        """None."""
        return x

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return super().group_matcher(coarse) | {"stem": r"^cls_token|^dist_token|^tokens"}

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = new_head(self.head)
