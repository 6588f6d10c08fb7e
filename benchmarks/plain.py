"""The paper's ViT, with and without SPT and LSA, in plain PyTorch: what smallvit's speed is measured against.

Written from the equations of Lee, Lee, Song 2021 (arXiv:2112.13492) in the form that the field's scripts have: SPT
shifts four copies of the image, concatenates, cuts patches, normalises, projects; attention is an einsum, a softmax
and another einsum, and LSA writes its mask into the scores. It imports nothing of smallvit or timm, and where there
are two common ways it takes the faster one (`masked_fill`, not an assignment by index), so that what is faster than
it is so for a reason.

Parameters have timm's names and are as many as `smallvit.create_model("vit", ...)` has; `plain_weights` takes them
over, and the logits are then the same: tests/test_benchmarks.py.

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
    """Images (b, 3, img_size, img_size) to logits (b, num_classes); the sizes are the paper's for 32 px."""

    def __init__(
        self,
        *,
        img_size: int = 32,
        num_classes: int = 100,
        patch_size: int = 4,
        dim: int = 192,
        depth: int = 9,
        spt: bool = False,
        lsa: bool = False,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_embed = (ShiftedPatches if spt else Patches)(patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*[Block(dim, lsa, drop_path) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, images: Float[Tensor, "b 3 y x"]) -> Float[Tensor, "b k"]:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Patches(nn.Module):
    """Patches, projected."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(3 * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        return self.proj(rearrange(images, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p))


class ShiftedPatches(nn.Module):
    """Patches of the image and of four copies shifted diagonally by half a patch, normalised and projected."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(5 * 3 * patch_size**2)
        self.proj = nn.Linear(5 * 3 * patch_size**2, dim)

    def forward(self, images: Tensor) -> Tensor:
        p, s = self.patch_size, self.patch_size // 2
        borders = (s, -s, s, -s), (-s, s, s, -s), (s, -s, -s, s), (-s, s, -s, s)
        views = torch.cat([images, *(F.pad(images, border) for border in borders)], dim=1)
        return self.proj(self.norm(rearrange(views, "b c (i p) (j q) -> b (i j) (c p q)", p=p, q=p)))


class Attention(nn.Module):
    """Self-attention of 12 heads of 16; LSA's temperature is learnt and its diagonal masked."""

    def __init__(self, dim: int, lsa: bool, heads: int = 12, head_dim: int = 16) -> None:
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
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            scores = (scores * self.temperature[:, None, None]).masked_fill(itself, -torch.inf)
        else:
            scores = scores * self.temperature
        y = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(dim=-1), v)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """Two layers, the inner one twice as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm layer, each of its residual paths dropped now and then."""

    def __init__(self, dim: int, lsa: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, lsa), MLP(dim)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: for each image all or nothing, the mean kept."""
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(kept) / kept


def plain_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """smallvit's weights of this model under the names, and in the shapes, that they have here."""
    named = {name.replace("patch_embed.proj.proj", "patch_embed.proj"): value for name, value in state_dict.items()}
    named = {name.replace("patch_embed.proj.norm", "patch_embed.norm"): value for name, value in named.items()}
    named["patch_embed.proj.weight"] = named["patch_embed.proj.weight"].flatten(1)  # without SPT a convolution's
    return named
