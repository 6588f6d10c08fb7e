"""From the maps of single layers to what the whole model looks at, over the grid of its first tokens.

    rollout     R ← ½(I + Ā) R,    Ā = mean over heads of A               Abnar, Zuidema 2020, arXiv:2005.00928
    relevance   R ← R + Ā R,       Ā = mean over heads of (∇A ⊙ A)⁺       Chefer, Gur, Wolf 2021, arXiv:2103.15679

R begins as the identity, ∇A is the gradient of a class's logit. Of R that row is wanted which the model's head reads:
the class token's, the mean of the class and the distillation token's, the mean of the image's tokens' where the model
pools them, or that of the query of attention pooling. It is taken through the layers from the last to the first.

Where the grid shrinks between layers (PiT, Swin, T2T), a token of the coarser grid stands for those of the finer one
that it covers, in equal parts, whatever weights the model merges them by; and where keys are of fewer places than the
queries (PVT, BinaryViT), so does a key. A class token that comes late (CaiT, T2T) starts with nothing of the image; in
class attention it alone gains, the patches stay as they are. Of binary attention A is for relevance the binary map.

Axes: b batch, n queries, m keys, t tokens (those before the image's, then a layer's grid), i j token grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smallvit.attention.layouts import Sides
from smallvit.attention.maps import AttentionMap, attention_map, uncompiled
from smallvit.attention.recorder import recording
from smallvit.errors import InputError


def rollout(maps: list[AttentionMap]) -> Float[Tensor, "b i j"]:
    """Attention rollout over the first layer's grid: each token's share, the rest is that of the tokens before it.

    Raises:
        InputError: a layer's keys are neither its queries nor merged of them, or its grid is finer than the one before.
    """

    return _traced(maps, lambda index: _mean(maps[index]), kept=0.5, gained=0.5)


def relevance(
    model: nn.Module, images: Float[Tensor, "b c h w"], classes: Int64[Tensor, " b"] | None = None
) -> Float[Tensor, "b i j"]:
    """What speaks for each image's class (by default the one predicted), over the first layer's grid; at least 0.

    The model should be in evaluation mode; its parameters' gradients are left alone.

    Raises:
        InputError: it attends to no tokens, or not as `rollout` can follow; a class is none of its.
    """
    plain = uncompiled(model)
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()  # frozen weights' maps have gradients, too
        with _graph_kept(plain), recording(plain, images, explicit=True) as recorder:
            logits = plain(images)
        score = _chosen(logits, classes).sum()
        probabilities = [part for seen in recorder.seen for part in seen.probabilities]
        flat = iter(torch.autograd.grad(score, probabilities, materialize_grads=True))
    maps = [attention_map(seen) for seen in recorder.seen]
    gradients = [seen.shaped(next(flat) for _ in seen.probabilities) for seen in recorder.seen]
    return _traced(maps, lambda index: _gain(maps[index], gradients[index]), kept=1.0, gained=1.0)


@contextmanager
def _graph_kept(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off, which would compute attention a second time, unwatched."""
    checkpointing = [module for module in model.modules() if vars(module).get("grad_checkpointing")]
    try:
        for module in checkpointing:
            module.grad_checkpointing = False
        yield
    finally:
        for module in checkpointing:
            module.grad_checkpointing = True


def _chosen(logits: Float[Tensor, "b k"], classes: Int64[Tensor, " b"] | None) -> Float[Tensor, " b"]:
    """Each image's logit of its class."""
    classes = logits.argmax(dim=1) if classes is None else classes.to(logits.device)
    if not 0 <= classes.min() <= classes.max() < logits.shape[1]:
        raise InputError(f"classes {classes.tolist()}: the model's are 0 to {logits.shape[1] - 1}")
    return logits.gather(1, classes[:, None])[:, 0]


def _mean(each: AttentionMap) -> Float[Tensor, "b n m"]:
    """Mean over the heads, windows assembled."""
    return replace(each, weights=each.weights.mean(dim=-3, keepdim=True)).full()[:, 0]


def _gain(each: AttentionMap, gradient: Tensor) -> Float[Tensor, "b n m"]:
    """Mean over the heads of (∇A ⊙ A)⁺, windows assembled."""
    gain = (gradient * each.weights).clamp(min=0).mean(dim=-3, keepdim=True)
    return (gain if each.window is None else each.assembled(gain))[:, 0]


def _traced(
    maps: Sequence[AttentionMap], matrix: Callable[[int], Float[Tensor, "b n m"]], *, kept: float, gained: float
) -> Float[Tensor, "b i j"]:
    """The row that is read at last, over the first layer's grid: the image's part of it.

    In each layer, tokens that ask keep `kept` of what they hold, and gain `gained` of what those hold that they attend
    to, by the layer's `matrix`.
    """
    row = None
    for index in reversed(range(len(maps))):
        each, attention = maps[index], matrix(index)
        row = _last(each, attention) if row is None else _before(row, each, maps[index + 1])
        n, m = attention.shape[1:]
        if not (n in (1, m) or _pools(each)):
            told = f"{each.layer}: its {m} keys are neither its {n} queries nor merged of them"
            raise InputError(f"{told}, which rollout and relevance need")
        asks = row[:, :n]
        with torch.autocast(row.device.type, enabled=False):
            gains = gained * (asks[:, None] @ attention)[:, 0]
        if _pools(each):
            gains = _over_finer(gains, each.prefix, each.grid, _grid(each))
        row = torch.cat([kept * asks, row[:, n:]], dim=1) + F.pad(gains, (row.shape[1] - gains.shape[1], 0))
    return row[:, _prefix(maps[0]) :].unflatten(-1, _grid(maps[0]))


def _last(each: AttentionMap, like: Tensor) -> Float[Tensor, "b t"]:
    """What the model's head reads of the last layer's tokens, in equal parts."""
    row = like.new_zeros(len(like), _prefix(each) + math.prod(_grid(each)))
    row[:, slice(_prefix(each), None) if each.reads is None else list(each.reads)] = 1
    return row / row.sum(dim=1, keepdim=True)


def _before(row: Float[Tensor, "b t"], each: AttentionMap, after: AttentionMap) -> Float[Tensor, "b u"]:
    """The row over the tokens of a layer, from that over those of the layer after.

    New tokens held nothing; of those before the image's that are there no more nothing was read.
    """
    prefix, own = _prefix(each), after.query_prefix if after.probes else 0
    new = _prefix(after) - own - prefix
    grid, coarser = _grid(each), _grid(after)
    if (new < 0 and grid != coarser) or not _covers(coarser, grid):
        raise InputError(f"{after.layer}: its tokens are not merged of those of {each.layer}; rollout cannot follow")
    row = F.pad(row[:, own:], (-new, 0))
    return row if grid == coarser else _over_finer(row, prefix, coarser, grid)


def _over_finer(row: Float[Tensor, "b t"], prefix: int, grid: Sides, finer: Sides) -> Float[Tensor, "b u"]:
    """A row over the tokens of a finer grid: what a token of the coarser one has goes to those that it covers."""
    tokens = torch.eye(math.prod(finer), device=row.device).unflatten(1, finer)
    with torch.autocast(row.device.type, enabled=False):
        patches = row[:, prefix:] @ F.adaptive_avg_pool2d(tokens, grid).flatten(1).T
    return torch.cat([row[:, :prefix], patches], dim=1)


def _covers(grid: Sides, finer: Sides) -> bool:
    """Whether tokens of a grid can be merged of those of another."""
    return all(side <= other for side, other in zip(grid, finer, strict=True))


def _pools(each: AttentionMap) -> bool:
    """Whether keys are merged of the queries' tokens."""
    return each.query_grid is not None and each.prefix == each.query_prefix and _covers(each.grid, each.query_grid)


def _grid(each: AttentionMap) -> Sides:
    """Rows and columns of the model's tokens; those of the keys may be fewer."""
    return each.query_grid or each.grid


def _prefix(each: AttentionMap) -> int:
    """Tokens before the image's, the one that asks alone among them."""
    return each.query_prefix + each.prefix if each.probes else max(each.prefix, each.query_prefix)
