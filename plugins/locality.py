"""Locality self-attention as a layer: a mixin that turns attention layers of timm's into it, and a layer of its own.

The layer's own `forward` runs as it is, so that whatever it does beside the scores stays: norms, rotary and relative
positions, gates, talking heads. Only its softmax hides the diagonal, and the constant it scales the scores by, `scale`,
is the learnt `temperature`. Where it calls the fused kernel, `attend` is called instead. A layer's class changes in
place, to one of two bases, `Locality` and timm's own, and changes back; classes are plain ones, so that instances
pickle. See `lsa` for the equation and `lsa_timm` for the classes.

Axes: b batch, h heads, n queries, m keys, d head width, c = h·d.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention, register_notrace_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smallvit.plugins.attend import add_bias, attend, is_plain, prefers_fused
from smallvit.plugins.lsa import LSAConfig, diagonal_bias, keep_alone, merge_masks


class Locality:
    """What turns an attention layer into locality self-attention; put before its class to adapt it."""

    adapters: ClassVar[dict[type[nn.Module], type[Locality]]] = {}
    """The adapter of every attention class that has one."""
    axes_after_heads: ClassVar[int] = 2
    """Axes behind the heads' in the tensor that is scaled."""
    temperature_per_head: ClassVar[bool] = True
    """Whether the heads have an axis to themselves; else one temperature serves the layer."""
    learns_its_scale: ClassVar[bool] = False
    """Whether the layer of timm has a learnt temperature already, and needs no second."""
    has_diagonal: ClassVar[bool] = True
    """Whether queries are the keys; class attention has one query, and no diagonal."""
    fusable: ClassVar[bool] = True
    """Whether the layer's call of the fused kernel keeps its heads as they are."""

    temperature: nn.Parameter | None
    openness: Tensor | None
    masked: bool

    adapted: ClassVar[type[nn.Module]]
    """The attention class that this one adapts."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__bases__[0] is Locality:  # not what others derive from an adapter
            cls.adapted = cls.__bases__[1]
            Locality.adapters[cls.adapted] = register_notrace_module(cls)

    @classmethod
    def adopt(cls, layer: nn.Module, config: LSAConfig, gradual: bool) -> None:
        """Turn a layer of the class adapted into this one, in place; its weights and hooks stay.

        `gradual` leaves the diagonal open for `set_openness` to close.
        """
        constant = vars(layer).get("scale", 1.0)
        layer.__class__ = cls
        layer._begin(constant, config, gradual)

    def _begin(self, constant: float, config: LSAConfig, gradual: bool) -> None:
        heads = self.score_heads if config.temperature == "head" and self.temperature_per_head else 1
        like = next(self.parameters())
        learnt = config.temperature != "fixed" and not self.learns_its_scale
        self.masked = config.mask and self.has_diagonal
        self.register_parameter(
            "temperature",
            nn.Parameter(torch.full((heads,), constant, device=like.device, dtype=like.dtype)) if learnt else None,
        )
        self.register_buffer("openness", torch.ones((), device=like.device) if gradual and self.masked else None)

    def release(self) -> None:
        """Turn back into the layer of timm's, in place."""
        del self.temperature, self.openness, self.masked
        self.__class__ = self.adapted

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why a layer of the class adapted cannot be, if it cannot."""
        return None

    @classmethod
    def changes(cls, config: LSAConfig) -> bool:
        """Whether anything of LSA is left in this layer by a variant."""
        hides = config.mask and cls.has_diagonal
        return hides or (config.temperature != "fixed" and not cls.learns_its_scale)

    @property
    def score_heads(self) -> int:
        """Number of attention maps that the layer computes."""
        return self.num_heads

    @property
    def added_parameters(self) -> int:
        """Parameters that the layer has more than timm's."""
        return 0 if self.temperature is None else self.temperature.numel()

    @property
    def scale(self) -> Tensor | float:
        """What the scores are multiplied by: the temperature, in place of timm's constant."""
        if self.temperature is None:
            return self.__dict__.get("scale", 1.0)
        return in_compute_dtype(self.temperature).view(-1, *[1] * self.axes_after_heads)

    @scale.setter
    def scale(self, constant: float) -> None:
        self.__dict__["scale"] = constant

    @property
    def fused_attn(self) -> bool:
        """Whether the layer's own code shall call the fused kernel, for which `attend` then stands in."""
        return self.fusable and self.__dict__.get("fused_attn", True)

    @fused_attn.setter
    def fused_attn(self, fused: bool) -> None:
        self.__dict__["fused_attn"] = fused

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.hide(None, x, *args, **kwargs)

    def hide(self, alone: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapted layer's own forward, the diagonal hidden but of tokens that are `alone`."""
        if isinstance(x, torch.fx.Proxy):
            raise TypeError("torch.fx cannot trace locality self-attention: use timm's create_feature_extractor")
        with HiddenDiagonal(self, alone):
            return super().forward(x, *args, **kwargs)

    def diagonal(self, n: int, m: int, like: Tensor) -> Float[Tensor, "n n"] | None:
        """The bias for scores of n queries and m keys; none where queries are not the keys, or alone."""
        return diagonal_bias(n, like, self.openness) if self.masked and n == m else None

    def scaled_qkv(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, d) by the layer `qkv`, the queries multiplied by the temperature.

        It is multiplied into q's rows of the weight matrix, which is exact and costs next to nothing.
        """
        h = self.num_heads
        if not is_plain(self.qkv):  # adapted, quantised or observed: it must be called
            q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=h)
            return q * self.scale, k, v
        width = self.qkv.out_features // 3
        factor = self.qkv.weight.new_ones(h) * (self.scale if self.temperature is None else self.temperature)
        factor = F.pad(factor.repeat_interleave(width // h), (0, 2 * width), value=1.0)
        bias = None if self.qkv.bias is None else self.qkv.bias * factor
        qkv = F.linear(x, self.qkv.weight * factor[:, None], bias)
        return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=h).unbind(0)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` with the temperature for its scale and without the diagonal."""
        n, m = q.shape[-2], k.shape[-2]
        if is_causal:
            attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril_()
        bias = self.diagonal(n, m, q)
        if attn_mask is not None:
            bias = merge_masks(bias, attn_mask)
        if self.temperature is None:
            return attend(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, bias, dropout_p)
        return attend(q * self.scale.to(q.dtype), k, v, bias, dropout_p)


class HiddenDiagonal(TorchFunctionMode):
    """While it is on, the softmax of scores hides the diagonal, and `Locality.attend` is the fused kernel.

    `alone` (w, n) are tokens of the windows whose diagonal stays, having nothing else to attend to.
    """

    def __init__(self, layer: Locality, alone: Tensor | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.alone = alone

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self.layer.attend(*args, **kwargs)
        if function is Tensor.softmax or function is torch.softmax or function is F.softmax:
            scores = args[0]
            bias = keep_alone(self.layer.diagonal(*scores.shape[-2:], scores), self.alone)
            return function(add_bias(scores, bias), *args[1:], **kwargs)
        return function(*args, **kwargs)


class LocalitySelfAttention(Locality, Attention):
    """Multi-head locality self-attention, with the parameter names of `timm.layers.Attention`.

    Tokens (b, n, dim) in, (b, n, dim) out. Beside `qkv` and `proj` it holds `temperature`, of shape (num_heads,).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        config: LSAConfig | None = None,
    ) -> None:
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self._begin((dim // num_heads) ** -0.5, config or LSAConfig(), gradual=False)

    def forward(
        self, x: Float[Tensor, "b n c"], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n c"]:
        if not self.fused_attn or type(self.q_norm) is not nn.Identity:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.scaled_qkv(x)
        n = x.shape[1]
        bias = self.diagonal(n, n, q)
        if is_causal:
            attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_()
        if attn_mask is not None:
            bias = merge_masks(bias, attn_mask)
        y = attend(q, self.k_norm(k), v, bias, self.attn_drop.p if self.training else 0.0)
        y = self.norm(rearrange(y, "b h n d -> b n (h d)"))
        if (gate := getattr(self, "gate", None)) is not None:  # older versions of timm have none
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


def in_compute_dtype(tensor: Tensor) -> Tensor:
    """The tensor as matrix products take it: in autocast's dtype where that is on."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def temperatures(model: nn.Module) -> dict[str, Float[Tensor, " h"]]:
    """The learnt temperatures of every patched layer, by the layer's name: one for each head, or one for the layer."""
    return {
        name: module.temperature.detach()
        for name, module in model.named_modules()
        if isinstance(module, Locality) and module.temperature is not None
    }


def set_openness(model: nn.Module, openness: float) -> None:
    """How much a token's own weight counts, from 1 (plain attention) to 0 (LSA), in layers patched with init="exact".

    It is a buffer. A moving average of a model's state averages it too: set it on the average as well.

    Raises:
        ValueError: `openness` is not between 0 and 1.
    """
    if not 0 <= openness <= 1:
        raise ValueError(f"openness {openness}: expected a share from 0 to 1")
    for module in model.modules():
        if isinstance(module, Locality) and module.openness is not None:
            module.openness.fill_(openness)


def set_fused_attention(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Put timm's own attention layers on the same path as patched ones, so that they compare fairly.

    `dtype` is what the matrix products run in: bfloat16 under bf16 autocast. Layers with a learnt bias on their
    scores (Swin, BEiT, relative positions) are left as timm sets them, and patched layers choose for themselves.
    """
    for module in model.modules():
        kept = isinstance(module, Locality) or hasattr(module, "relative_position_bias_table")
        if hasattr(module, "fused_attn") and not kept:
            module.fused_attn = prefers_fused(device_type, dtype)
