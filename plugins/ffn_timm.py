"""Add a depthwise 3x3 convolution to the MLPs of timm's models.

    u = φ(W₁ x),    v = GELU(BN(DWConv(u))),    y = W₂ (u + v)  or  W₂ v

Sources: DHVT (arXiv:2210.05958, §3.3) with the residual; LocalViT (arXiv:2104.05707) and CeiT (arXiv:2103.11816)
without. The convolution runs over the patch tokens as a grid. Prefix tokens (class, distillation, registers) pass the
MLP without it, or, with `class_token="reweight"`, bypass the MLP and are multiplied by factors of the mean patch:

    c ← c ⊙ E(GELU(C(mean y))),    C: D → D/4,  E: D/4 → D

Differs from DHVT: there are no batch norms after W₁ and W₂, so that trained weights of an MLP keep their meaning.

In `Mlp`, `GluMlp` and `SwiGLU` the dropout between φ and W₂ has no parameters. That leaf is replaced; timm's `forward`
runs unchanged.

Axes: b batch, n tokens, p prefix tokens, i j patch grid, c hidden width, d token width.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import (
    beit,
    cait,
    eva,
    naflexvit,
    pit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
    xcit,
)
from torch import Tensor, nn

from smallvit.plugins.base import Init, Site, original
from smallvit.plugins.ffn import FFNConfig
from smallvit.plugins.leaf import Derived, derive, fx_leaf, replace_module, replacing_plugin

MLPS = (Mlp, GluMlp, SwiGLU)
WINDOWED = (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)
"""Blocks that know their grid: `input_resolution`."""
CHANNELS_LAST = (volo.Outlooker, volo.Transformer)
"""Blocks whose tokens have the axes b i j d."""
TOKENS = (
    beit.Block,
    cait.LayerScaleBlock,
    eva.EvaBlock,
    eva.EvaBlockPostNorm,
    vision_transformer.Block,
    vision_transformer.ParallelThingsBlock,
    vision_transformer.ResPostBlock,
    vision_transformer_relpos.RelPosBlock,
    vision_transformer_relpos.ResPostRelPosBlock,
    vision_transformer_sam.Block,
)
"""Blocks of tokens b n d, whose grid is the patch embedding's."""
CLASS_ATTENTION = (cait.LayerScaleBlockClassAttn, volo.ClassBlock, xcit.ClassAttentionBlock)


class PatchGrid:
    """The grid of a block's patch tokens, read from the module that decides it.

    Args:
        owner: Module with the attribute `attribute`, rows and columns of the grid.
        model: Model that puts prefix tokens before the patch tokens.
        halvings: How often the grid is halved before the block, rounded up.
    """

    def __init__(self, owner: nn.Module, attribute: str, model: nn.Module | None = None, halvings: int = 0) -> None:
        self.owner, self.attribute, self.model, self.halvings = owner, attribute, model, halvings

    @property
    def prefix(self) -> int:
        """Number of tokens before the patch tokens."""
        if isinstance(self.model, pit.PoolingVisionTransformer):
            return self.model.cls_token.shape[1]
        return getattr(self.model, "num_prefix_tokens", 0)

    def shape(self, tokens: int) -> tuple[int, int]:
        """Return rows and columns for a number of tokens. Images of another size than the model's must be square.

        Raises:
            ValueError: the tokens fill no such grid.
        """
        rows, columns = (-(-side // 2**self.halvings) for side in getattr(self.owner, self.attribute))
        patches = tokens - self.prefix
        if rows * columns == patches:
            return rows, columns
        if (side := isqrt(patches)) ** 2 != patches:
            raise ValueError(
                f"{patches} patch tokens fill neither the model's grid of {rows}x{columns} nor a square; "
                f"change the image size by smallvit.set_input_size"
            )
        return side, side


@fx_leaf
class DepthwiseConv(nn.Dropout):
    """Depthwise convolution of hidden features (b, n, c) or (b, i, j, c), and the dropout that it replaces."""

    def __init__(self, channels: int, grid: PatchGrid | None, config: FFNConfig, p: float = 0.0) -> None:
        super().__init__(p)
        self.grid, self.config = grid, config
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=not config.norm)
        self.norm = nn.BatchNorm2d(channels) if config.norm else nn.Identity()

    def forward(self, x: Float[Tensor, "b *n c"]) -> Float[Tensor, "b *n c"]:
        if x.ndim == 4:
            return super().forward(self.mix(x))
        prefix, shape = self.grid.prefix, self.grid.shape(x.shape[1])
        patches = self.mix(x[:, prefix:].unflatten(1, shape)).flatten(1, 2)
        return super().forward(torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches)

    def mix(self, x: Float[Tensor, "b i j c"]) -> Float[Tensor, "b i j c"]:
        """Return the grid of hidden features after the convolution."""
        y = F.gelu(self.norm(self.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return x + y if self.config.residual else y

    @property
    def last(self) -> nn.Module:
        """The last layer with weights: while they are zero, the residual branch returns zero."""
        return self.norm if self.config.norm else self.conv

    @torch.no_grad()
    def zero(self) -> None:
        """Let the residual branch return zero."""
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)


class Reweighting(Derived):
    """Mixin of an MLP class: prefix tokens bypass the MLP and are multiplied by factors of the mean patch."""

    added = ("compress", "excite")

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        prefix = self.drop1.grid.prefix
        patches = super().forward(x)[:, prefix:]
        factors = self.excite(F.gelu(self.compress(patches.mean(dim=1, keepdim=True))))
        return torch.cat([x[:, :prefix] * factors, patches], dim=1)


def sites(model: nn.Module, config: FFNConfig, init: Init) -> Iterator[Site]:
    """Yield the MLP of every block of patch tokens."""
    for name, block in model.named_modules():
        for child, mlp in _mlps(block):
            if replacing_plugin(getattr(mlp, "drop1", mlp)) != "ffn":
                yield Site(f"{name}.{child}".lstrip("."), mlp, _refusal(model, block, mlp, config, init), block)


def apply(model: nn.Module, site: Site, config: FFNConfig, init: Init) -> None:
    """Add the convolution to an MLP."""
    mlp, like = site.layer, site.layer.fc2.weight
    grid = _grid(model, site.parent)
    new = DepthwiseConv(mlp.fc2.in_features, grid, config, mlp.drop1.p)
    if init == "preserve" or config.zero:
        new.zero()
    replace_module(mlp, mlp.drop1, new.to(like.device, like.dtype).train(mlp.training), "ffn")
    if config.class_token == "reweight" and grid is not None and grid.prefix:
        width = mlp.fc2.out_features
        mlp.__class__ = derive(Reweighting, type(mlp))
        mlp.compress = nn.Linear(width, width // 4, device=like.device, dtype=like.dtype)
        mlp.excite = nn.Linear(width // 4, width, device=like.device, dtype=like.dtype)
    if hasattr(model, "initialize_linears"):  # a model with its own initialization
        model.initialize_linears(mlp.drop1)


def remove(model: nn.Module, layer: nn.Module) -> None:
    """Remove the convolution from an MLP."""
    if isinstance(layer, Reweighting):
        layer.release()
    layer.drop1 = original(layer.drop1)


def patched(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every MLP with a convolution."""
    for name, module in model.named_modules():
        if isinstance(module, MLPS) and isinstance(module.drop1, DepthwiseConv):
            yield name, module


def describe(layer: nn.Module) -> str:
    """Describe the form of the convolution."""
    config = layer.drop1.config
    form = "added to" if config.residual else "in place of"
    reweighted = "; prefix tokens are reweighted by the mean patch" if isinstance(layer, Reweighting) else ""
    return (
        f"depthwise 3x3 convolution {form} the hidden features{', with batch norm' if config.norm else ''}{reweighted}"
    )


def describe_loss(layer: nn.Module) -> str | None:
    """Return the convolution, unless it adds zero."""
    conv, last = layer.drop1, layer.drop1.last
    kept = not conv.config.residual or isinstance(layer, Reweighting) or last.weight.any() or last.bias.any()
    return "the depthwise convolutions with their weights" if kept else None


def new_keys(layer: nn.Module) -> set[str]:
    """Return the keys of the convolution, its norm and the reweighting."""
    return {key for key in layer.state_dict() if key.split(".")[0] in ("drop1", "compress", "excite")}


def _mlps(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the MLPs of a block of a known class."""
    if isinstance(block, vision_transformer.ParallelThingsBlock):
        yield from ((f"ffns.{index}.mlp", each.mlp) for index, each in enumerate(block.ffns))
    elif isinstance(block, (*WINDOWED, *CHANNELS_LAST, *TOKENS, *CLASS_ATTENTION)) and hasattr(block, "mlp"):
        yield "mlp", block.mlp


def _refusal(model: nn.Module, block: nn.Module, mlp: nn.Module, config: FFNConfig, init: Init) -> str | None:
    """Return why an MLP cannot be changed, if it cannot."""
    if isinstance(block, CLASS_ATTENTION):
        return "it processes the class token only"
    if type(mlp) not in MLPS or not isinstance(mlp.fc2, nn.Linear):
        return "it is not timm's Mlp, GluMlp or SwiGLU of linear layers"
    if isinstance(model, naflexvit.NaFlexVit):
        return "each image has its own grid"
    if isinstance(block, TOKENS) and _grid(model, block) is None:
        return "the grid of its tokens is unknown; patch the whole model"
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        return "patch tokens are dropped in training (patch_drop_rate)"
    if init == "preserve" and not config.residual:
        return "without the residual it changes the outputs; use init='paper'"
    if init == "preserve" and config.class_token == "reweight":
        return "reweighted prefix tokens change the outputs; use init='paper'"
    return None


def _grid(model: nn.Module, block: nn.Module) -> PatchGrid | None:
    """Return the grid of a block's patch tokens; None if the tokens have it as axes, or it is unknown."""
    if isinstance(block, WINDOWED):
        return PatchGrid(block, "input_resolution")
    if isinstance(block, CHANNELS_LAST):
        return None
    if isinstance(model, pit.PoolingVisionTransformer):
        stage = next(i for i, stage in enumerate(model.transformers) if any(block is each for each in stage.modules()))
        return PatchGrid(model.patch_embed, "grid_size", model, stage)
    if isinstance(model, cait.Cait | vision_transformer_sam.VisionTransformerSAM):  # no prefix tokens in these blocks
        return PatchGrid(model.patch_embed, "grid_size")
    owner = next((each for each in (getattr(model, "patch_embed", None), model) if hasattr(each, "grid_size")), None)
    return PatchGrid(owner, "grid_size", model) if owner is not None and hasattr(model, "num_prefix_tokens") else None
