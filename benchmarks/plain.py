"""Define the paper's ViT, with and without SPT and LSA, in plain PyTorch: the baseline of the training benchmark.

Written from the equations of Lee, Lee, Song 2021 (arXiv:2112.13492) in the usual form: SPT shifts four copies of the
image, concatenates them, cuts patches, normalizes and projects; attention is an einsum, a softmax and another einsum,
and LSA writes its mask into the scores. It imports nothing from smallvit or timm. Where there are two common ways it
takes the faster one (`masked_fill` instead of assignment by index).

Parameters have timm's names and shapes up to `plain_weights`, which converts the weights of
`smallvit.create_model("vit", ...)`; the logits are then the same (tests/test_benchmarks.py).

Axes: b batch, c channels, h heads, n queries, m keys, d head width, p q patch height and width, i j token grid,
s the three of q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class PlainViT(nn.Module):
    """ViT of images (b, in_chans, img_size, img_size); the default size is the paper's for 32 px."""

    def __init__(
        self,
        *,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 100,
        patch_size: int = 4,
        dim: int = 192,
        depth: int = 9,
        heads: int = 12,
        spt: bool = False,
        lsa: bool = False,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_embed = (ShiftedPatches if spt else Patches)(in_chans, patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, lsa, drop_path) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, images: Float[Tensor, "b c y x"]) -> Float[Tensor, "b k"]:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Patches(nn.Module):
    """Project non-overlapping patches."""

    def __init__(self, in_chans: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_chans * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        return self.proj(rearrange(images, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p))


class ShiftedPatches(nn.Module):
    """Normalize and project patches of the image and of four copies shifted diagonally by half a patch."""

    def __init__(self, in_chans: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(5 * in_chans * patch_size**2)
        self.proj = nn.Linear(5 * in_chans * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        p, s = self.patch_size, self.patch_size // 2
        borders = (s, -s, s, -s), (-s, s, s, -s), (s, -s, -s, s), (-s, s, -s, s)
        views = torch.cat([images, *(F.pad(images, border) for border in borders)], dim=1)
        return self.proj(self.norm(rearrange(views, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p)))


class Attention(nn.Module):
    """Self-attention with heads of width 16; with LSA, a learned temperature and a masked diagonal."""

    def __init__(self, dim: int, heads: int, lsa: bool, head_dim: int = 16) -> None:
        super().__init__()
        self.heads, self.lsa = heads, lsa
        temperature = torch.full((heads,), head_dim**-0.5)
        self.temperature = nn.Parameter(temperature) if lsa else head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k)
        if self.lsa:
            diagonal = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            scores = (scores * self.temperature[:, None, None]).masked_fill(diagonal, -torch.inf)
        else:
            scores = scores * self.temperature
        y = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(dim=-1), v)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two linear layers with an expansion of 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth."""

    def __init__(self, dim: int, heads: int, lsa: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, lsa), MLP(dim)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        """Apply stochastic depth per image."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep) / keep


def plain_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert smallvit's weights to the names and shapes of `PlainViT`."""
    named = {name.replace("patch_embed.proj.proj", "patch_embed.proj"): value for name, value in state_dict.items()}
    named = {name.replace("patch_embed.proj.norm", "patch_embed.norm"): value for name, value in named.items()}
    named["patch_embed.proj.weight"] = named["patch_embed.proj.weight"].flatten(1)  # without SPT a convolution's
    return named
