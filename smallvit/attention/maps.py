"""Extract the attention maps of a model, and compute their entropy and distance.

    A = softmax(q kᵀ t + bias),    entropy −Σⱼ Aᵢⱼ log Aᵢⱼ,    distance Σⱼ Aᵢⱼ |xᵢ − xⱼ|

A map is the output of the softmax in the forward pass. It excludes what follows: the second mix of talking heads
(CaiT), and the binarization of binary attention. The maps of layers with several softmaxes (differential attention,
ConViT) are concatenated as more heads. The distance is from Dosovitskiy et al. 2021, arXiv:2010.11929, section D.7.

A `TorchFunctionMode` intercepts the fused kernel and softmax calls in any of timm's layers, patched or not, and passes
their results on. Module hooks track which layer is running. Leaf modules get no hooks, because timm's layers may take
another code path with hooks.

Axes: b batch, w windows of an image, h heads, n queries, m keys, d head width, i j token grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from smallvit.attention.layout import Call, Layout, detect_layout, find_transformer, nearest_grid
from smallvit.plugins.binary_layers import BinaryAttending
from smallvit.utils.errors import InputError

MASKED = math.exp(-50)
"""Masked keys have smaller weights: timm's window masks subtract 100 from a score, other masks give 0."""
SOFTMAXES = (Tensor.softmax, torch.softmax, F.softmax)


# Maps


@dataclass(frozen=True, kw_only=True)
class AttentionMap(Layout):
    """Attention of each head of a layer, in fp32, before dropout."""

    layer: str
    """Qualified name of the module, e.g. blocks.0.attn."""
    weights: Float[Tensor, "b h n m"] | Float[Tensor, "b w h n n"]
    """Softmax over the keys, for each window if `window` is not None."""

    def image(self) -> Float[Tensor, "b h i j"]:
        """Return the attention of the tokens that the classifier reads, over the grid of the keys.

        These are the class token, its mean with a distillation token, or the mean over image tokens. Windows are
        reassembled; attention to padding is dropped, as in `full`.
        """
        if self.window is None:
            keys = self.weights[..., self.prefix :]
            return keys[..., self._read_queries, :].mean(dim=-2).unflatten(-1, self.grid)
        received = rearrange(self._unpadded().sum(dim=-2), "b w h n -> b h (w n)") / self._count
        image = received.new_zeros(*received.shape[:2], self._count + 1)
        image[..., self._window_indices().flatten()] = received
        return image[..., :-1].unflatten(-1, self.grid)

    def full(self) -> Float[Tensor, "b h n m"]:
        """Return one matrix over all tokens, with zeros between windows.

        Attention to padding is dropped, and the rows are scaled to sum to 1.
        """
        return self.weights if self.window is None else self.merge_windows(self._unpadded())

    def merge_windows(self, windows: Float[Tensor, "b w h n n"]) -> Float[Tensor, "b h m m"]:
        """Merge values of this map's windows into one matrix over all tokens, without padding."""
        rows = self._window_indices()
        matrix = windows.new_zeros(windows.shape[0], windows.shape[2], self._count + 1, self._count + 1)
        matrix[:, :, rows[:, :, None], rows[:, None]] = windows.transpose(1, 2)
        return matrix[..., :-1, :-1]

    def uniform(self) -> AttentionMap:
        """Return the map of uniform attention to all keys that are not masked, for one image and one head.

        A key is masked if no head attends to it in any image.
        """
        visible = (self.weights > MASKED).any(dim=0, keepdim=True).any(dim=-3, keepdim=True).float()
        return replace(self, weights=visible / visible.sum(dim=-1, keepdim=True).clamp(min=1))

    def entropy(self) -> Float[Tensor, "b h"]:
        """Return the entropy in nats, averaged over queries: 0 for attention to one key, log m to m keys alike."""
        shares = self.weights if self.window is None else self._unpadded()
        entropy = -torch.xlogy(shares, shares).sum(dim=-1)
        return entropy.mean(dim=-1) if self.window is None else entropy.sum(dim=(1, 3)) / self._count

    def distance(self, pixels: int | tuple[int, int]) -> Float[Tensor, "b h"]:
        """Return the mean distance in pixels between image tokens and those they attend to, weighted by attention.

        Class and distillation tokens are excluded. NaN if no image token is a query, as in class attention.

        Args:
            pixels: Side of the image, or its height and width.
        """
        sides = to_2tuple(pixels)
        keys = _centers(self.grid, sides, self.weights)
        if self.window is not None:
            centers = F.pad(keys, (0, 0, 0, 1))[self._window_indices()]
            distances = _distances(centers, centers)[:, None]
            return (self._unpadded() * distances).sum(dim=(1, 3, 4)) / self._count
        shares = self.weights[..., self.query_prefix :, self.prefix :]
        count = shares.shape[-2]
        queries = keys
        if 0 < count != self._count:  # keys are pooled
            queries = _centers(self.query_grid or nearest_grid(count, sides), sides, self.weights)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        return (shares * _distances(queries[:count], keys)).sum(dim=-1).mean(dim=-1)

    @property
    def _count(self) -> int:
        return math.prod(self.grid)

    @property
    def _read_queries(self) -> list[int]:
        """Indices of the queries that the classifier reads; in class attention, the only one."""
        queries = range(self.weights.shape[-2])
        return list(queries[self.query_prefix :] or queries) if self.readout is None else list(self.readout)

    def _window_indices(self) -> Int64[Tensor, "w n"]:
        """Return the index of each token of each window; the number of tokens for padding."""
        numbers = torch.arange(self._count, device=self.weights.device).view(self.grid)
        numbers = numbers.roll([-step for step in self.shift], dims=(0, 1))
        missing = [-side % step for side, step in zip(self.grid, self.window, strict=True)]
        numbers = F.pad(numbers, (0, missing[1], 0, missing[0]), value=self._count)
        return rearrange(numbers, "(i y) (j z) -> (i j) (y z)", y=self.window[0], z=self.window[1])

    def _unpadded(self) -> Float[Tensor, "b w h n n"]:
        """Return the weights without padding; tokens that attend to padding only attend to themselves instead."""
        if not any(side % step for side, step in zip(self.grid, self.window, strict=True)):
            return self.weights
        real = self._window_indices() < self._count
        shares = self.weights * real[:, None, None, :]
        total = shares.sum(dim=-1, keepdim=True)
        itself = torch.eye(shares.shape[-1], device=shares.device)
        return torch.where(total > 0, shares / total, itself) * real[:, None, :, None]


def extract_attention(
    model: nn.Module, images: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b k"], list[AttentionMap]]:
    """Run a model and return its logits, bit-equal to `model(images)`, and the maps of its layers in order.

    The model runs in the caller's precision and gradient mode. A compiled model runs a second time, uncompiled, for
    the maps. DataParallel and DistributedDataParallel are unwrapped.

    Raises:
        InputError: the model has no attention between tokens (a CNN), or tokens without a known grid.
    """
    compiled = any(module._compiled_call_impl or isinstance(module, OptimizedModule) for module in model.modules())
    plain = unwrap_model(model)
    with record_attention(plain, images) as recorder:
        logits = plain(images)
    maps = [build_map(layer) for layer in recorder.layers]
    return (model(images) if compiled else logits), maps


def build_map(layer: LayerAttention) -> AttentionMap:
    """Build the map of a recorded layer."""
    return AttentionMap(layer=layer.name, weights=layer.reshape(layer.probabilities), **vars(layer.layout))


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model within torch.compile, DataParallel or DistributedDataParallel."""
    while isinstance(model, OptimizedModule | DataParallel | DistributedDataParallel):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def _centers(grid: tuple[int, int], sides: tuple[int, int], like: Tensor) -> Float[Tensor, "n 2"]:
    """Return the center of each token of a grid in pixels (down, right)."""
    down, right = (
        (torch.arange(count, device=like.device) + 0.5) * (side / count)
        for count, side in zip(grid, sides, strict=True)
    )
    return torch.cartesian_prod(down, right)


def _distances(queries: Float[Tensor, "*w n 2"], keys: Float[Tensor, "*w m 2"]) -> Float[Tensor, "*w n m"]:
    return (queries[..., :, None, :] - keys[..., None, :, :]).norm(dim=-1)


# Recording


@dataclass(frozen=True)
class LayerAttention:
    """Attention probabilities of a layer in one call."""

    call: Call
    layout: Layout
    images: int
    heads: int
    probabilities: list[Tensor]
    """Outputs of the layer's softmax calls, of shape (b·w, h, n, m) or (b·w·h, n, m)."""

    @property
    def name(self) -> str:
        """Qualified name of the layer in the uncompiled model."""
        return self.call.name.replace("_orig_mod.", "")

    def reshape(self, values: Iterable[Tensor]) -> Float[Tensor, "*b h n m"]:
        """Reshape values like the probabilities to (b, h, n, m), or (b, w, h, n, n) for windows; fp32, detached."""
        parts = [part.detach().float().reshape(-1, self.heads, *part.shape[-2:]) for part in values]
        joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return joined if self.layout.window is None else joined.unflatten(0, (self.images, -1))


class AttentionRecorder(TorchFunctionMode):
    """Record attention in `layers` in the order of computation while the mode is active.

    Args:
        model: The model that runs.
        images: Its inputs.
        explicit: Replace the fused kernel by two matrix products, so that gradients reach the probabilities. Binary
            attention is then recorded after binarization.
    """

    def __init__(self, model: nn.Module, images: Tensor, explicit: bool) -> None:
        super().__init__()
        self.model, self.images, self.explicit = model, images, explicit
        self.calls: list[Call] = []
        self.layers: list[LayerAttention] = []

    def enter_module(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note that a module starts (forward pre-hook)."""
        shape = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), ())
        self.calls.append(Call(name, module, shape, next(filter(None, map(_integer_pair, inputs)), None)))

    def exit_module(self, *_: Any) -> None:
        """Note that the last module ends (forward hook)."""
        self.calls.pop()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._run_fused(*args, **kwargs)
        if self.explicit and function is F.dropout and isinstance(self.calls[-1].module, BinaryAttending):
            self._record_binary(args[0])
        result = function(*args, **kwargs)
        if function in SOFTMAXES and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, result.ndim - 1):
            self._record(result if self.explicit else result.detach())
        return result

    def _run_fused(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.set_grad_enabled(self.explicit and torch.is_grad_enabled()):  # else they add nothing to the graph
            weights = attention_probabilities(q, k, *args, **kwargs)
        self._record(weights)
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)
        return weights.to(v.dtype) @ v.repeat_interleave(weights.shape[-3] // v.shape[-3], dim=-3)

    def _record_binary(self, weights: Tensor) -> None:
        """Replace the last softmax by its binarized values; the softmax has no gradient where it exceeds their step."""
        last = self.layers[-1].probabilities
        if last[-1].shape == weights.shape:  # else dropout is applied to the output of the layer
            last[-1] = weights

    def _record(self, weights: Tensor) -> None:
        """Record probabilities of the running layer; ignore a softmax that is not attention."""
        call = self.calls[-1]
        heads = weights.shape[1] if weights.ndim == 4 else getattr(call.module, "num_heads", None)
        if weights.ndim < 3 or heads is None:
            return
        last = self.layers[-1] if self.layers else None
        if last is not None and last.call is call and last.probabilities[0].shape == weights.shape:
            last.probabilities.append(weights)
            return
        model, images = find_transformer(self.model, self.calls, self.images.shape)
        layout, shape = None, (weights.shape[:-2].numel() // heads, *weights.shape[-2:])
        if weights.ndim <= 4:
            layout = detect_layout(shape, self.calls, model, images, [layer.layout for layer in self.layers])
        if layout is None:
            raise InputError(
                f"{call.name} of {type(self.model).__name__}: its {tuple(weights.shape)} attention is between tokens "
                "without a known grid, as after dropping (patch_drop_rate in training) or merging tokens; use ViT, "
                "DeiT, CaiT, PiT, Swin, T2T or a similar model"
            )
        self.layers.append(LayerAttention(call, layout, images[0], heads, [weights]))


def _integer_pair(value: Any) -> tuple[int, int] | None:
    """Return a sequence of two integers as a tuple, and None for other values."""
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return tuple(value) if is_pair else None


@contextmanager
def record_attention(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, explicit: bool = False
) -> Iterator[AttentionRecorder]:
    """Record the attention of a model that runs in this context with `images`; compiled modules run uncompiled.

    Args:
        model: The model.
        images: Its inputs.
        explicit: See `AttentionRecorder`.

    Raises:
        InputError: no layer attends to tokens, or to tokens without a known grid.
    """
    recorder = AttentionRecorder(model, images, explicit)
    hooks = []
    try:
        for name, module in model.named_modules():
            if module is model or next(module.children(), None) is not None:
                hooks += [
                    module.register_forward_pre_hook(partial(recorder.enter_module, name)),
                    module.register_forward_hook(recorder.exit_module),
                ]
        with torch.compiler.set_stance("force_eager"), recorder:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
    if not recorder.layers:
        raise InputError(
            f"{type(model).__name__} has no attention between tokens; expected a transformer such as ViT, DeiT, CaiT, "
            "PiT, Swin or T2T, not a CNN"
        )


def attention_probabilities(
    q: Float[Tensor, "*b n d"],
    k: Float[Tensor, "*b m d"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*b n m"]:
    """Return the probabilities that `F.scaled_dot_product_attention` computes, in fp32, before dropout."""
    with torch.autocast(q.device.type, enabled=False):
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        scores = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask.float()
        return scores.softmax(dim=-1)
