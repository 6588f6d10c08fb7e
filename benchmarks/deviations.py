"""Measure how far the paper's models deviate from their official code where they differ on purpose.

    python benchmarks/deviations.py

Each row replaces one part by the official one and prints the largest change in the logits of eight random images, and
the standard deviation of those logits. The weights are the initial ones plus noise of N(0, 0.02²), so that every layer
has an effect. docs/models.md has the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import smallvit
from smallvit.models.lee2021 import LocalTalkingHeads

IMAGE_SIZE, NOISE = 32, 0.02


class DoubleResidual(nn.Module):
    """The official T2T block: x + LN(x) + attention(LN(x)), then the MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.norm1(x)
        x = x + y + self.block.attn(y)
        return x + self.block.mlp(self.block.norm2(x))


class UnmaskedTalkingHeads(nn.Module):
    """The official CaiT attention with LSA: a token's score with itself becomes -1e-9 before heads are mixed."""

    def __init__(self, layer: LocalTalkingHeads) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        q, k, v = rearrange(layer.qkv(x), "b n (three h d) -> three b h n d", three=3, h=layer.num_heads)
        scores = q @ k.transpose(-2, -1) * layer.temperature.view(-1, 1, 1)
        diagonal = torch.eye(x.shape[1], dtype=torch.bool)
        scores = layer.proj_l(scores.masked_fill(diagonal, -1e-9).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = layer.proj_w(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return layer.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))


def use_double_residual(model: nn.Module) -> None:
    """Give the blocks of T2T the official residuals."""
    model.blocks = nn.Sequential(*map(DoubleResidual, model.blocks))


def remove_last_norm(model: nn.Module) -> None:
    """Remove T2T's last LayerNorm."""
    model.norm = nn.Identity()


def use_official_mask(model: nn.Module) -> None:
    """Give CaiT's patch blocks the official mask."""
    for block in model.blocks:
        block.attn = UnmaskedTalkingHeads(block.attn)


def use_official_eps(model: nn.Module) -> None:
    """Set eps of every LayerNorm to the official 1e-5."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


ROWS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "t2t: second residual within blocks": ("t2t", use_double_residual),
    "t2t: last LayerNorm not called": ("t2t", remove_last_norm),
    "cait with LSA: mask of -1e-9": ("cait", use_official_mask),
    "vit: LayerNorm eps of 1e-5": ("vit", use_official_eps),
    "cait: LayerNorm eps of 1e-5": ("cait", use_official_eps),
    "pit: LayerNorm eps of 1e-5": ("pit", use_official_eps),
}


@torch.no_grad()
def main() -> None:
    """Print a table of the deviations."""
    table = Table("deviation", "max change of logits", "std of logits")
    for title, (arch, change) in ROWS.items():
        torch.manual_seed(0)
        images = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)
        model = smallvit.create_model(arch, img_size=IMAGE_SIZE, num_classes=10, plugins={"lsa": "LSA" in title}).eval()
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        logits, official = model(images), copy.deepcopy(model)
        change(official)
        difference = (official.eval()(images) - logits).abs().max()
        table.add_row(title, f"{difference:.2g}", f"{logits.std():.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()
