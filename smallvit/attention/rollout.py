"""Compute attention rollout and relevance of a whole model over the token grid of its first layer.

    rollout     R ← ½(I + Ā) R,    Ā = mean over heads of A               Abnar, Zuidema 2020, arXiv:2005.00928
    relevance   R ← R + Ā R,       Ā = mean over heads of (∇A ⊙ A)⁺       Chefer, Gur, Wolf 2021, arXiv:2103.15679

R starts as the identity; ∇A is the gradient of a class's logit. The result is the row of R that the classifier reads
(class token, its mean with the distillation token, mean over image tokens, or query of attention pooling). Only this
row is computed, from the last layer to the first.

- Where the grid shrinks between layers (PiT, Swin, T2T), a token of the coarser grid is distributed equally over the
  tokens of the finer grid that it covers, whatever weights the model merges them by. Keys that are pooled from the
  queries' tokens (PVT, BinaryViT) are distributed in the same way.
- A class token that is added late (CaiT, T2T) starts without any share of the image. In class attention only this
  token is updated.
- Relevance of binary attention uses the binary maps.

Axes: b batch, n queries, m keys, t tokens (prefix tokens, then a layer's grid), u tokens of the layer before, i j grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smallvit.attention.layout import Sides
from smallvit.attention.maps import AttentionMap, build_map, record_attention, unwrap_model
from smallvit.utils.errors import InputError


def rollout(maps: list[AttentionMap]) -> Float[Tensor, "b i j"]:
    """Compute attention rollout over the first layer's grid; the share of prefix tokens is missing from the sum of 1.

    Raises:
        InputError: the keys of a layer are neither its queries nor pooled from them, or its grid is finer than the
            grid of the layer before.
    """
    return _propagate(maps, lambda index: _mean(maps[index]), keep=0.5, add=0.5)


def relevance(
    model: nn.Module, images: Float[Tensor, "b c h w"], classes: Int64[Tensor, " b"] | None = None
) -> Float[Tensor, "b i j"]:
    """Compute the relevance (at least 0) of each token of the first layer's grid for a class of each image.

    Set the model to evaluation mode first. Gradients of its parameters are left unchanged.

    Args:
        model: The model.
        images: Its inputs.
        classes: The class of each image; by default the predicted class.

    Raises:
        InputError: the model has no attention between tokens, or `rollout` does not support it; a class is out of
            range.
    """
    plain = unwrap_model(model)
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()  # so that maps have gradients even if all weights are frozen
        with record_attention(plain, images, explicit=True) as recorder:
            logits = plain(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise InputError(f"{type(plain).__name__} does not return logits (batch, classes); relevance needs them")
        score = _select_logits(logits, classes).sum()
        probabilities = [part for layer in recorder.layers for part in layer.probabilities]
        flat = iter(torch.autograd.grad(score, probabilities, materialize_grads=True))
    maps = [build_map(layer) for layer in recorder.layers]
    gradients = [layer.reshape(next(flat) for _ in layer.probabilities) for layer in recorder.layers]
    return _propagate(maps, lambda index: _weight_by_gradient(maps[index], gradients[index]), keep=1.0, add=1.0)


def _select_logits(logits: Float[Tensor, "b k"], classes: Int64[Tensor, " b"] | None) -> Float[Tensor, " b"]:
    classes = logits.argmax(dim=1) if classes is None else classes.to(logits.device)
    if not 0 <= classes.min() <= classes.max() < logits.shape[1]:
        raise InputError(f"classes {classes.tolist()}: expected 0 to {logits.shape[1] - 1}")
    return logits.gather(1, classes[:, None])[:, 0]


def _mean(each: AttentionMap) -> Float[Tensor, "b n m"]:
    """Return the mean over heads, with windows merged."""
    return replace(each, weights=each.weights.mean(dim=-3, keepdim=True)).full()[:, 0]


def _weight_by_gradient(each: AttentionMap, gradient: Tensor) -> Float[Tensor, "b n m"]:
    """Return the mean over heads of (∇A ⊙ A)⁺, with windows merged."""
    weighted = (gradient * each.weights).clamp(min=0).mean(dim=-3, keepdim=True)
    return (weighted if each.window is None else each.merge_windows(weighted))[:, 0]


def _propagate(
    maps: Sequence[AttentionMap], matrix: Callable[[int], Float[Tensor, "b n m"]], *, keep: float, add: float
) -> Float[Tensor, "b i j"]:
    """Return the image part of the row of R that the classifier reads, with R ← (keep I + add Ā) R in each layer.

    Args:
        maps: The maps of all layers.
        matrix: Returns Ā of a layer by its index.
        keep: Weight of the identity, for queries.
        add: Weight of Ā.
    """
    row = None
    for index in reversed(range(len(maps))):
        each, attention = maps[index], matrix(index)
        row = _read_last(each, attention) if row is None else _to_layer_before(row, each, maps[index + 1])
        n, m = attention.shape[1:]
        if not (n in (1, m) or _has_pooled_keys(each)):
            reason = f"its {m} keys are neither its {n} queries nor pooled from them"
            raise InputError(f"{each.layer}: {reason}; rollout and relevance do not support this")
        queries = row[:, :n]
        with torch.autocast(row.device.type, enabled=False):
            added = add * (queries[:, None] @ attention)[:, 0]
        if _has_pooled_keys(each):
            added = _to_finer_grid(added, each.prefix, each.grid, _grid(each))
        row = torch.cat([keep * queries, row[:, n:]], dim=1) + F.pad(added, (row.shape[1] - added.shape[1], 0))
    return row[:, _prefix(maps[0]) :].unflatten(-1, _grid(maps[0]))


def _read_last(each: AttentionMap, like: Tensor) -> Float[Tensor, "b t"]:
    """Return equal weights on the tokens of the last layer that the classifier reads."""
    row = like.new_zeros(len(like), _prefix(each) + math.prod(_grid(each)))
    row[:, slice(_prefix(each), None) if each.readout is None else list(each.readout)] = 1
    return row / row.sum(dim=1, keepdim=True)


def _to_layer_before(row: Float[Tensor, "b t"], each: AttentionMap, after: AttentionMap) -> Float[Tensor, "b u"]:
    """Return a row over the tokens of a layer, from a row over the tokens of the layer after.

    Prefix tokens added by the layer after are dropped; for removed prefix tokens the row is 0.
    """
    prefix, own = _prefix(each), after.query_prefix if after.latent_query else 0
    new = _prefix(after) - own - prefix
    grid, coarser = _grid(each), _grid(after)
    if (new < 0 and grid != coarser) or not _fits_into(coarser, grid):
        reason = f"its tokens are not merged from those of {each.layer}"
        raise InputError(f"{after.layer}: {reason}; rollout and relevance do not support this")
    row = F.pad(row[:, own:], (-new, 0))
    return row if grid == coarser else _to_finer_grid(row, prefix, coarser, grid)


def _to_finer_grid(row: Float[Tensor, "b t"], prefix: int, grid: Sides, finer: Sides) -> Float[Tensor, "b u"]:
    """Distribute the value of each token of a grid equally over the tokens of a finer grid that it covers."""
    tokens = torch.eye(math.prod(finer), device=row.device).unflatten(1, finer)
    with torch.autocast(row.device.type, enabled=False):
        patches = row[:, prefix:] @ F.adaptive_avg_pool2d(tokens, grid).flatten(1).T
    return torch.cat([row[:, :prefix], patches], dim=1)


def _fits_into(grid: Sides, finer: Sides) -> bool:
    """Return whether tokens of a grid can be merged from those of another."""
    return all(side <= other for side, other in zip(grid, finer, strict=True))


def _has_pooled_keys(each: AttentionMap) -> bool:
    return each.query_grid is not None and each.prefix == each.query_prefix and _fits_into(each.grid, each.query_grid)


def _grid(each: AttentionMap) -> Sides:
    """Return rows and columns of the image tokens of a layer; pooled keys have fewer."""
    return each.query_grid or each.grid


def _prefix(each: AttentionMap) -> int:
    """Return the number of prefix tokens of a layer, including a single query."""
    return each.query_prefix + each.prefix if each.latent_query else max(each.prefix, each.query_prefix)
