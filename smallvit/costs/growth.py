"""How the work of attention grows with the image: published formulas, and what the layers themselves compute.

    global      4 h w C² + 2 (h w)² C         Ω(MSA), Liu et al. 2021, arXiv:2103.14030, eq. 1
    windowed    4 h w C² + 2 M² h w C         Ω(W-MSA), eq. 2

for h · w tokens C wide and windows of M × M of them: multiply-accumulates of the projections of q, k, v and the output,
and of the two products with scores. What the formulas leave out is counted here as well: class tokens, which are tokens
too (h w + 1); maps that windows do not divide, which are filled up; stages with a C and an h w of their own; heads that
are together wider than the tokens (CaiT), or outputs narrower than they (T2T); heads that are mixed before and after
the softmax (2 n² heads², CaiT); class attention, whose one query is the class token; and keys and values of fewer
places, which pass one layer more (BinaryViT). LSA adds nothing: its temperature is multiplied into the weights, its
mask added to the scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from timm.layers import Attention
from timm.models.cait import Cait, ClassAttn
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import nn

from smallvit.binaryvit import BinaryViT
from smallvit.binaryvit_blocks import ShortcutAttention
from smallvit.plugins.binary_timm import is_attention
from smallvit.published import ClassTalkingHeads
from smallvit.t2t import STRIDE, T2TViT

WHOLE_BLOCKS = (ParallelScalingBlock, DiffParallelScalingBlock)
"""Layers that LSA adapts which compute more than attention."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a layer of attention computes for one image."""

    windows: int = 1
    queries: int
    """In each window."""
    keys: int
    width: int
    """Of the tokens that come in."""
    inner: int
    """Of all heads together."""
    out: int
    """Of the tokens that go out."""
    mixed: int = 0
    """Heads that are mixed before and after the softmax."""
    layers_of_keys: int = 2
    """Linear layers that make keys and values."""

    @property
    def tokens(self) -> int:
        """Tokens that attend, or are attended to where these are more."""
        return self.windows * max(self.queries, self.keys)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        made = self.queries + self.layers_of_keys * self.keys
        projections = made * self.width * self.inner + self.queries * self.inner * self.out
        products = 2 * self.queries * self.keys * (self.inner + self.mixed**2)
        return self.windows * (projections + products)


def scores(model: nn.Module, img_size: int) -> list[Scores] | None:
    """What every layer of attention computes by the formulas, in their order; None for families they are not known of.

    The model is of the size of these images.
    """
    if isinstance(model, SwinTransformer):
        return _windowed(model)
    if isinstance(model, Cait):
        n = model.patch_embed.num_patches
        return [_of(block.attn, n) for block in model.blocks] + [_of_class(b.attn, n) for b in model.blocks_token_only]
    if isinstance(model, PoolingVisionTransformer):
        stages = zip(_halved(model.patch_embed.grid_size[0]), model.transformers, strict=False)
        prefix = model.cls_token.shape[1]
        return [_of(block.attn, side**2 + prefix) for side, stage in stages for block in stage.blocks]
    if isinstance(model, T2TViT):
        sides = _halved(-(-img_size // STRIDE))
        unfolds = [_of(layer.attn, next(sides) ** 2) for layer in model.tokens[:-1]]
        n = next(sides) ** 2 + model.prefix().shape[1]
        return unfolds + [_of(block.attn, n) for block in model.blocks]
    if isinstance(model, BinaryViT):
        prefixes = [0] * (len(model.stages) - 1) + [model.num_prefix_tokens]
        return [
            _of_fewer(block.attn, rows * columns, prefix)
            for stage, (rows, columns), prefix in zip(model.stages, model.grids, prefixes, strict=True)
            for block in stage.blocks
        ]
    if isinstance(model, VisionTransformer):
        layers = [getattr(block, "attn", None) for block in model.blocks]
        n = model.patch_embed.num_patches + model.num_prefix_tokens
        known = all(isinstance(layer, Attention) and getattr(layer, "gate", None) is None for layer in layers)
        return [_of(layer, n) for layer in layers] if known else None
    return None


def formula(model: nn.Module, img_size: int) -> int | None:
    """Multiply-accumulates of all attention for an image, by the formulas; None for families they are not known of."""
    found = scores(model, img_size)
    return None if found is None else sum(each.macs for each in found)


def measured(model: nn.Module, macs: Mapping[str, int]) -> int | None:
    """The same from what `profile.macs_by_layer` counted; None where no layer is known to attend, and to do only that.

    These are the layers that LSA or binary attention has adapted, or could.
    """
    names = [name for name, layer in model.named_modules() if _attends(layer)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return sum(macs.get(name, 0) for name in outermost) if names else None


def _attends(layer: nn.Module) -> bool:
    return is_attention(layer) and not isinstance(layer, WHOLE_BLOCKS)


def _of(layer: nn.Module, n: int, windows: int = 1) -> Scores:
    """Attention among n tokens, in each of so many windows."""
    mixed = layer.num_heads if hasattr(layer, "proj_l") else 0
    width, inner = layer.qkv.in_features, layer.qkv.out_features // 3
    out = layer.proj.out_features
    return Scores(windows=windows, queries=n, keys=n, width=width, inner=inner, out=out, mixed=mixed)


def _of_class(layer: ClassAttn, patches: int) -> Scores:
    """Attention of the class token: to the patches, and in timm's CaiT to itself."""
    ours = isinstance(layer, ClassTalkingHeads)
    width, inner = layer.q.in_features, layer.q.out_features
    keys, mixed = (patches, layer.num_heads) if ours else (patches + 1, 0)
    return Scores(queries=1, keys=keys, width=width, inner=inner, out=layer.proj.out_features, mixed=mixed)


def _of_fewer(layer: ShortcutAttention, places: int, prefix: int) -> Scores:
    """Attention of so many places and `prefix` tokens to means of places and these tokens."""
    width, made = layer.q.in_features, 2 if layer.reduction == 1 else 3
    keys = places // layer.reduction**2 + prefix
    return Scores(queries=places + prefix, keys=keys, width=width, inner=width, out=width, layers_of_keys=made)


def _windowed(model: SwinTransformer) -> list[Scores]:
    stages = zip(_halved(model.patch_embed.grid_size[0]), model.layers, strict=False)
    blocks = chain.from_iterable(((side, block) for block in stage.blocks) for side, stage in stages)
    return [
        _of(block.attn, block.window_size[0] ** 2, (-(-side // block.window_size[0])) ** 2) for side, block in blocks
    ]


def _halved(side: int) -> Iterable[int]:
    """The side of a map, then of what is left after every halving, rounded up."""
    while True:
        yield side
        side = -(-side // 2)
