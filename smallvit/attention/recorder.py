"""Watching a forward pass for its attention, whoever computes it: the fused kernel, or a softmax over scores.

A mode of torch's sees both as they are called, in timm's layers and in patched ones alike, and passes on what they
give; hooks tell which layer is at work. Leaf modules get none, so that every layer takes the path it takes unwatched.

Axes: b batch, w windows of an image, h heads, n queries, m keys, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smallvit.attention.layouts import Call, Layout, layout
from smallvit.errors import InputError
from smallvit.plugins.binary import BinaryAttending

SOFTMAXES = (Tensor.softmax, torch.softmax, F.softmax)


@dataclass(frozen=True)
class Seen:
    """What a layer attended with in one call."""

    call: Call
    layout: Layout
    images: int
    heads: int
    probabilities: list[Tensor]
    """As the layer has them: (b·w, h, n, m) or (b·w·h, n, m); several of some layers."""

    @property
    def layer(self) -> str:
        """Its name in the model that is not compiled."""
        return self.call.name.replace("_orig_mod.", "")

    def shaped(self, values: Iterable[Tensor]) -> Float[Tensor, "*b h n m"]:
        """Values like the probabilities, in fp32 and out of the graph: (b, h, n, m), or (b, w, h, n, n) of windows."""
        parts = [part.detach().float().reshape(-1, self.heads, *part.shape[-2:]) for part in values]
        joined = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return joined if self.layout.window is None else joined.unflatten(0, (self.images, -1))


class Recorder(TorchFunctionMode):
    """While it is on, attention is noted in `seen`, in the order of computation.

    With `explicit`, the fused kernel's work is done by two products instead, so that gradients pass the probabilities;
    those of binary attention are the binary ones then.
    """

    def __init__(self, model: nn.Module, images: Tensor, explicit: bool) -> None:
        super().__init__()
        self.model, self.images, self.explicit = model, images, explicit
        self.calls: list[Call] = []
        self.seen: list[Seen] = []

    def begin(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module begins: a hook."""
        shape = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), ())
        self.calls.append(Call(name, module, shape, next(filter(None, map(_pair, inputs)), None)))

    def end(self, *_: Any) -> None:
        """A module ends: a hook."""
        self.calls.pop()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if self.explicit and function is F.dropout and isinstance(self.calls[-1].module, BinaryAttending):
            self._made_binary(args[0])
        result = function(*args, **kwargs)
        if function in SOFTMAXES and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, result.ndim - 1):
            self._note(result if self.explicit else result.detach())
        return result

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.set_grad_enabled(self.explicit and torch.is_grad_enabled()):  # else no trace in the graph
            weights = probabilities(q, k, *args, **kwargs)
        self._note(weights)
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)
        return weights.to(v.dtype) @ v.repeat_interleave(weights.shape[-3] // v.shape[-3], dim=-3)

    def _made_binary(self, weights: Tensor) -> None:
        """Keep binary maps in place of their softmax, which has no gradient where it is above their step."""
        last = self.seen[-1].probabilities
        if last[-1].shape == weights.shape:  # it is not what the layer gives
            last[-1] = weights

    def _note(self, weights: Tensor) -> None:
        """Keep what a layer attends with; a softmax elsewhere is none of ours."""
        call = self.calls[-1]
        heads = weights.shape[1] if weights.ndim == 4 else getattr(call.module, "num_heads", None)
        if weights.ndim < 3 or heads is None:
            return
        if self.seen and self.seen[-1].call is call and self.seen[-1].probabilities[0].shape == weights.shape:
            self.seen[-1].probabilities.append(weights)
            return
        known = self._layout(weights, heads)
        if known is None:
            raise InputError(
                f"{call.name} of {type(self.model).__name__} attends with {tuple(weights.shape)} to tokens that lie in "
                "no grid that is known here; attention maps are those of ViT, DeiT, CaiT, PiT, Swin, T2T and their like"
            )
        self.seen.append(Seen(call, known, len(self.images), heads, [weights]))

    def _layout(self, weights: Tensor, heads: int) -> Layout | None:
        if weights.ndim > 4:
            return None
        batch = weights.shape[:-2].numel() // heads
        before = [seen.layout for seen in self.seen]
        return layout((batch, *weights.shape[-2:]), self.calls, self.model, self.images.shape, before)


def _pair(value: Any) -> tuple[int, int] | None:
    """Two numbers, if that is what a module was given."""
    two = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return tuple(value) if two else None


@contextmanager
def recording(model: nn.Module, images: Float[Tensor, "b c h w"], *, explicit: bool = False) -> Iterator[Recorder]:
    """A recorder of what `model` does with `images` within the context; what is compiled runs uncompiled."""
    recorder = Recorder(model, images, explicit)
    hooks = []
    try:
        for name, module in model.named_modules():
            if module is model or next(module.children(), None) is not None:
                hooks += [
                    module.register_forward_pre_hook(partial(recorder.begin, name)),
                    module.register_forward_hook(recorder.end),
                ]
        with torch.compiler.set_stance("force_eager"), recorder:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
    if not recorder.seen:
        raise InputError(
            f"{type(model).__name__} has no attention between tokens that could be shown; a CNN has none, ViT, DeiT, "
            "CaiT, PiT, Swin and T2T have"
        )


def probabilities(
    q: Float[Tensor, "*b n d"],
    k: Float[Tensor, "*b m d"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*b n m"]:
    """What `F.scaled_dot_product_attention` weighs the values by, in fp32, before dropout."""
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
