"""Attention maps: what each layer of a model attends to, head by head, as it computes its logits.

    A = softmax(q kᵀ t + bias),    entropy −Σⱼ Aᵢⱼ log Aᵢⱼ,    distance Σⱼ Aᵢⱼ |xᵢ − xⱼ|

They are taken from the forward pass itself, of any of timm's layers, patched or not, fused or not (`recorder`); how
tokens lie in the image is told by `layouts`. The distance is that of Dosovitskiy et al. 2021, arXiv:2010.11929, §D.7.
Of talking heads (CaiT) the map is what the softmax gives, before the second mix of the heads, and of binary attention
the same, before it is made binary; of layers with several softmaxes (differential attention, ConViT), all of them, as
if they were more heads.

Axes: b batch, w windows of an image, h heads, n queries, m keys, i j token grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from smallvit.attention.layouts import nearest_grid
from smallvit.attention.recorder import Seen, recording

HIDDEN = math.exp(-50)
"""What is masked weighs less: timm's masks of windows take 100 from a score, others leave nothing."""


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """What the heads of one layer attend to, in fp32, before dropout."""

    layer: str
    """Qualified name of the module, e.g. blocks.0.attn."""
    weights: Float[Tensor, "b h n m"] | Float[Tensor, "b w h n n"]
    """Softmax over the keys; where `window` is given, of each window."""
    prefix: int
    """Class and distillation tokens, and registers, that stand before the image's among the keys."""
    query_prefix: int
    """The same among the queries; in class attention, 1 of 1."""
    grid: tuple[int, int]
    """Rows and columns of the image's tokens among the keys."""
    query_grid: tuple[int, int] | None = None
    """The same among the queries, where theirs is another; None also where a single token asks."""
    window: tuple[int, int] | None = None
    """Rows and columns of a window, in tokens."""
    shift: tuple[int, int] = (0, 0)
    """By how many tokens the image was rolled up and left before it was cut into windows."""
    reads: tuple[int, ...] | None = None
    """The queries of which the model's head reads the mean, by what becomes of them: (0,), the class token; (0, 1), it
    and a distillation token. None: it pools the image's tokens."""
    probes: bool = False
    """Whether what asks is no token of the model, but the layer's own (attention pooling)."""

    def image(self) -> Float[Tensor, "b h i j"]:
        """Where that looks which the model's head reads: the class token, the mean of it and a distillation token, or
        the mean of the image's tokens, and so what each receives; over the grid of the keys.

        Windows lie where they were cut; what padding receives is left out, as in `full`.
        """
        if self.window is None:
            keys = self.weights[..., self.prefix :]
            return keys[..., self._asking, :].mean(dim=-2).unflatten(-1, self.grid)
        received = rearrange(self._unpadded().sum(dim=-2), "b w h n -> b h (w n)") / self._count
        image = received.new_zeros(*received.shape[:2], self._count + 1)
        image[..., self._places().flatten()] = received
        return image[..., :-1].unflatten(-1, self.grid)

    def full(self) -> Float[Tensor, "b h n m"]:
        """One matrix over all tokens; of windows, zero between two of them.

        What padding receives is left out, and the rows are scaled to sum to one.
        """
        return self.weights if self.window is None else self.assembled(self._unpadded())

    def assembled(self, windows: Float[Tensor, "b w h n n"]) -> Float[Tensor, "b h m m"]:
        """Values of this map's windows in one matrix over all tokens, those of padding left out."""
        rows = self._places()
        matrix = windows.new_zeros(windows.shape[0], windows.shape[2], self._count + 1, self._count + 1)
        matrix[:, :, rows[:, :, None], rows[:, None]] = windows.transpose(1, 2)
        return matrix[..., :-1, :-1]

    def even(self) -> AttentionMap:
        """The map if each query attended alike to all keys in its reach: of one image and one head.

        In reach are those that any head attends to in any of the images; what is masked is not.
        """
        seen = (self.weights > HIDDEN).any(dim=0, keepdim=True).any(dim=-3, keepdim=True).float()
        return replace(self, weights=seen / seen.sum(dim=-1, keepdim=True).clamp(min=1))

    def entropy(self) -> Float[Tensor, "b h"]:
        """In nats, the mean over the queries: 0 where each attends to one key, log m where all to m keys alike."""
        shares = self.weights if self.window is None else self._unpadded()
        entropy = -torch.xlogy(shares, shares).sum(dim=-1)
        return entropy.mean(dim=-1) if self.window is None else entropy.sum(dim=(1, 3)) / self._count

    def distance(self, pixels: int | tuple[int, int]) -> Float[Tensor, "b h"]:
        """How far tokens look, in pixels of an image of this side (or height and width).

        It is the mean over the image's tokens of the distance to those attended to, weighed by the attention to them;
        class and distillation tokens count neither as queries nor as keys. NaN where no token of the image asks, as
        in class attention.
        """
        sides = to_2tuple(pixels)
        keys = _centres(self.grid, sides, self.weights)
        if self.window is not None:
            centres = F.pad(keys, (0, 0, 0, 1))[self._places()]
            distances = _distances(centres, centres)[:, None]
            return (self._unpadded() * distances).sum(dim=(1, 3, 4)) / self._count
        shares = self.weights[..., self.query_prefix :, self.prefix :]
        asking = shares.shape[-2]
        queries = keys
        if 0 < asking != self._count:  # keys are pooled
            queries = _centres(self.query_grid or nearest_grid(asking, sides), sides, self.weights)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        return (shares * _distances(queries[:asking], keys)).sum(dim=-1).mean(dim=-1)

    @property
    def _count(self) -> int:
        return math.prod(self.grid)

    @property
    def _asking(self) -> list[int]:
        """The queries whose mean is looked at; in class attention, the only one."""
        queries = range(self.weights.shape[-2])
        return list(queries[self.query_prefix :] or queries) if self.reads is None else list(self.reads)

    def _places(self) -> Int64[Tensor, "w n"]:
        """The number of the token at each place of each window; the number of tokens where there is padding."""
        numbers = torch.arange(self._count, device=self.weights.device).view(self.grid)
        numbers = numbers.roll([-step for step in self.shift], dims=(0, 1))
        missing = [-side % step for side, step in zip(self.grid, self.window, strict=True)]
        numbers = F.pad(numbers, (0, missing[1], 0, missing[0]), value=self._count)
        return rearrange(numbers, "(i y) (j z) -> (i j) (y z)", y=self.window[0], z=self.window[1])

    def _unpadded(self) -> Float[Tensor, "b w h n n"]:
        """Weights without those of padding; a token that attends to padding alone stays with itself."""
        real = self._places() < self._count
        if real.all():
            return self.weights
        shares = self.weights * real[:, None, None, :]
        total = shares.sum(dim=-1, keepdim=True)
        itself = torch.eye(shares.shape[-1], device=shares.device)
        return torch.where(total > 0, shares / total, itself) * real[:, None, :, None]


def record(model: nn.Module, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], list[AttentionMap]]:
    """Logits of a model, to the last bit what `model(images)` gives, and the maps of its layers in their order.

    The model runs as it is, in the caller's precision and gradient mode, and nothing of it changes. A compiled model
    runs a second time, uncompiled, for the maps.

    Raises:
        InputError: it attends to no tokens (a CNN), or to some that lie in no grid that is known.
    """
    compiled = any(module._compiled_call_impl or isinstance(module, OptimizedModule) for module in model.modules())
    plain = uncompiled(model)
    with recording(plain, images) as recorder:
        logits = plain(images)
    maps = [attention_map(seen) for seen in recorder.seen]
    return (model(images) if compiled else logits), maps


def attention_map(seen: Seen) -> AttentionMap:
    """What was seen of a layer, as its map."""
    return AttentionMap(layer=seen.layer, weights=seen.shaped(seen.probabilities), **vars(seen.layout))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given; one that it was not, itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _centres(grid: tuple[int, int], sides: tuple[int, int], like: Tensor) -> Float[Tensor, "n 2"]:
    """Where the middles of a grid's tokens are, in pixels down and to the right."""
    down, right = (
        (torch.arange(count, device=like.device) + 0.5) * (side / count)
        for count, side in zip(grid, sides, strict=True)
    )
    return torch.cartesian_prod(down, right)


def _distances(queries: Float[Tensor, "*w n 2"], keys: Float[Tensor, "*w m 2"]) -> Float[Tensor, "*w n m"]:
    return (queries[..., :, None, :] - keys[..., None, :, :]).norm(dim=-1)
