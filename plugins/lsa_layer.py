"""Compute locality self-attention (LSA): a learned temperature per head, and no token attends to itself.

    LSA(x) = softmax(M(q kᵀ · t)) v,    M(S)ᵢⱼ = Sᵢⱼ for i ≠ j, −∞ for i = j

Source: Lee, Lee, Song 2021, "Vision Transformer for Small-Size Datasets", arXiv:2112.13492, §3.3. `t` multiplies
the scores (the paper's 1/τ), one per head, and starts at head_dim^-0.5. The class token is masked like any other.

For trained models the mask can be phased in: a diagonal weight w from 1 to 0 multiplies each token's own exp(Sᵢᵢ). At
w = 1 this is plain attention, at w = 0 it is LSA.

Differs from the official code: where a token has nothing else to attend to (a single token, or a mask that hides
all others), it attends to itself instead of giving NaN. `t` is kept out of weight decay: it is one-dimensional,
and timm's parameter groups exempt such parameters.

Axes: b batch, h heads, n tokens, d head width, c = h·d.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smallvit.plugins.leaf import Adapter, is_plain, shared_constant
from smallvit.plugins.lsa import LSAConfig
from smallvit.plugins.sdpa import add_bias, attend

QUERIES = {"qkv": 3, "qk": 2, "q": 1, "q_proj": 1}
"""Layers that compute queries, and the number of equal parts of their outputs, of which queries are the first."""
AFFINE = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
HIDDEN = -1e4
"""What a mask adds to scores that shall not count, at most; some write this, some the least number, some −∞."""


def diagonal_bias(n: int, like: Tensor, diagonal_weight: Tensor | None = None) -> Float[Tensor, "n n"] | None:
    """Return the bias that masks the diagonal, log(diagonal_weight) on it; None for a single token."""
    if n == 1:
        return None
    if diagonal_weight is not None:
        return torch.diag(diagonal_weight.log().to(like.dtype).expand(n))
    return shared_constant(diagonal_mask, like, n)


def diagonal_mask(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n n"]:
    """Return −∞ on the diagonal and 0 elsewhere."""
    itself = torch.eye(n, dtype=torch.bool, device=device)
    return torch.zeros(n, n, dtype=dtype, device=device).masked_fill(itself, float("-inf"))


def ones(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " n"]:
    """Return n ones."""
    return torch.ones(n, dtype=dtype, device=device)


def merge_masks(
    bias: Float[Tensor, "n n"] | None, attn_mask: Bool[Tensor, ...] | Float[Tensor, ...]
) -> Float[Tensor, "#b #h n n"]:
    """Add a caller's mask (True = may attend, or an additive bias), keeping self-attention as the last resort.

    It is that of tokens whose mask is at most `HIDDEN` for all others.
    """
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, float("-inf"))
    attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if bias is None:
        return attn_mask
    itself = torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device)
    alone = ((attn_mask <= HIDDEN) | itself).all(dim=-1, keepdim=True)
    return (attn_mask + bias).masked_fill(alone & itself, 0.0)


def keep_alone(
    bias: Float[Tensor, "n n"] | None, alone: Bool[Tensor, "w n"] | None
) -> Float[Tensor, "n n"] | Float[Tensor, "w 1 n n"] | None:
    """Return the bias of the diagonal without tokens that have nothing else to attend to."""
    if bias is None or alone is None:
        return bias
    return torch.where(torch.diag_embed(alone), 0.0, bias)[:, None]


class Locality(Adapter):
    """Mixin that turns an attention layer into locality self-attention.

    The layer's own `forward` runs unchanged, with norms, rotary and relative positions, gates and talking heads. Only
    its softmax masks the diagonal, and its constant `scale` is the learned `temperature`. Its call of the fused kernel
    is replaced by `attend`.
    """

    adapters: ClassVar[dict[type[nn.Module], type[Locality]]] = {}
    added = ("temperature", "diagonal_weight", "masked", "fuses", "constant")
    axes_after_heads: ClassVar[int] = 2
    """Axes behind the heads' in the tensor that is scaled."""
    temperature_per_head: ClassVar[bool] = True
    """Whether heads have a separate axis; else the layer has one temperature."""
    learns_its_scale: ClassVar[bool] = False
    """Whether timm's layer has a learned temperature already."""
    has_diagonal: ClassVar[bool] = True
    """Whether queries are the keys; class attention has one query, and no diagonal."""
    fusable: ClassVar[bool] = True
    """Whether the layer's call of the fused kernel keeps its heads unchanged."""
    foldable: ClassVar[bool] = True
    """Whether the scores are proportional to the outputs of a layer in `QUERIES`, and nothing else depends on them."""
    heads_first: ClassVar[bool] = False
    """Whether these outputs are split into heads before they are split into queries, keys and values."""

    temperature: nn.Parameter | None
    diagonal_weight: Tensor | None
    masked: bool
    constant: float = 1.0
    """Scale of the unpatched layer, at which temperatures start: a copy of timm's `scale`, as older torch.compile takes
    `__dict__["scale"]` for the property of that name."""
    chooses_kernel: ClassVar[bool] = True
    """Whether the layer chooses its path itself; see `sdpa.set_fused_attention`."""
    fuses: bool = True
    """A copy of timm's `fused_attn`, likewise."""
    irreversible: str | None = None
    """Why the layer cannot be unpatched: set where it is fused for inference."""

    @classmethod
    def adopt(cls, layer: nn.Module, config: LSAConfig, gradual: bool) -> None:
        """Turn a layer of the adapted class into this one, in place; its weights and hooks stay.

        `gradual` leaves the diagonal unmasked until `set_lsa_strength` masks it.
        """
        scale = getattr(layer, "scale", None)
        layer.__class__ = cls
        layer._begin(scale if isinstance(scale, float) else 1.0, config, gradual)

    def _begin(self, constant: float, config: LSAConfig, gradual: bool) -> None:
        heads = self.score_heads if config.temperature == "head" and self.temperature_per_head else 1
        like = next((weight for weight in self.parameters() if weight.is_floating_point()), torch.empty(()))
        learned = config.temperature != "fixed" and not self.learns_its_scale
        self.masked = config.mask and self.has_diagonal
        self.constant, self.fuses = constant, self.__dict__.get("fused_attn", True)
        self.register_parameter(
            "temperature",
            nn.Parameter(torch.full((heads,), constant, device=like.device, dtype=like.dtype)) if learned else None,
        )
        self.register_buffer("diagonal_weight", torch.ones((), device=like.device) if gradual and self.masked else None)

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Return why a layer of the adapted class cannot be adapted, if it cannot."""
        return None

    @classmethod
    def changes(cls, config: LSAConfig) -> bool:
        """Return whether a configuration changes layers of this class."""
        hides = config.mask and cls.has_diagonal
        return hides or (config.temperature != "fixed" and not cls.learns_its_scale)

    @property
    def score_heads(self) -> int:
        """Number of attention maps that the layer computes."""
        return self.num_heads

    @property
    def scale(self) -> Tensor | float:
        """Factor of the scores: the temperature, in place of timm's constant."""
        if self.temperature is None:
            return self.constant
        kind, temperature = self.temperature.device.type, self.temperature
        if torch.is_autocast_enabled(kind):
            temperature = temperature.to(torch.get_autocast_dtype(kind))
        return temperature.view(-1, *[1] * self.axes_after_heads)

    @scale.setter
    def scale(self, constant: float) -> None:
        self.__dict__["scale"] = self.constant = constant

    @property
    def fused_attn(self) -> bool:
        """Whether timm's forward calls the fused kernel, which is replaced by `attend`."""
        return self.fusable and self.fuses

    @fused_attn.setter
    def fused_attn(self, fused: bool) -> None:
        self.__dict__["fused_attn"] = self.fuses = fused

    def folds(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return views of parameters and the factors that give the same scores at timm's scale; None if none do.

        They are the rows of weight and bias that compute the queries. An affine norm behind those is shared by the
        heads, so that its factors must be equal.
        """
        if self.temperature is None or self.temperature.is_meta:
            return []
        factor = self.temperature.detach() / torch.full_like(self.temperature, self.constant)
        if torch.allclose(factor, torch.ones_like(factor), rtol=0, atol=1e-6):
            return []
        rows = self.query_rows()
        if (factor == factor[0]).all():
            factor = factor[:1]
        if not rows or any(len(factor) not in (1, len(each)) for each in rows):
            return None
        return [(each, factor.view(-1, *[1] * (each.ndim - 1))) for each in rows]

    def query_rows(self) -> list[Tensor]:
        """Return views of the parameters that scale the queries, (h, ...), or (1, ...) if heads share them."""
        norm = getattr(self, "q_norm", None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return [each[None] for each in norm.parameters(recurse=False)] if not any(norm.children()) else []
        for name, parts in QUERIES.items() if self.foldable else ():
            layer = getattr(self, name, None)
            layer = getattr(layer, "bn", layer)  # in timm's pairs of a product and a batch norm
            kind = layer.before if isinstance(layer, Adapter) else type(layer)
            if kind in AFFINE and is_plain(layer, type(layer)):
                h, own = self.temperature.numel(), [each for each in (layer.weight, layer.bias) if each is not None]
                if self.heads_first:
                    width = getattr(self, "key_dim", None) or self.dim_head
                    return [each.unflatten(0, (self.num_heads, -1))[:, :width] for each in own]
                bias = getattr(self, "q_bias", None)  # in BEiT and EVA
                rows = [each.unflatten(0, (parts, h, -1))[0] for each in own]
                return rows if bias is None else [*rows, bias.unflatten(0, (h, -1))]
        return []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.hide(None, x, *args, **kwargs)

    def hide(self, alone: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted layer's forward with the diagonal masked, except for tokens that are `alone`."""
        with HiddenDiagonal(self, alone):
            return super().forward(x, *args, **kwargs)

    def diagonal(self, n: int, m: int, like: Tensor) -> Float[Tensor, "n n"] | None:
        """Return the bias for scores of n queries and m keys; None if they differ, or for a single token."""
        return diagonal_bias(n, like, self.diagonal_weight) if self.masked and n == m else None

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the temperatures into the queries where that is exact, and a mask that is phased in completely."""
        one_bit = any(isinstance(each, Adapter) for each in self.children())  # and bits do not scale
        if self.temperature is not None and not one_bit and (folds := self.folds()) is not None:
            for rows, factor in folds:
                rows.mul_(factor)
            self.temperature = None
        if self.diagonal_weight is not None and not self.diagonal_weight.is_meta and self.diagonal_weight == 0:
            self.diagonal_weight = None
        self.irreversible, self.chooses_kernel = "it is fused for inference", False

    def qkv_and_scale(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return queries, keys and values (b, h, n, d) by the layer `qkv`, and the scale that the scores still need.

        A temperature is multiplied into q's rows of the weight matrix where that is plain, which is exact and almost
        free.
        """
        h, factor = self.num_heads, self.temperature
        if factor is None or not is_plain(self.qkv):
            q, k, v = self.qkv(x).unflatten(2, (3, h, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return (q, k, v, self.constant) if factor is None else (q * self.scale, k, v, 1.0)
        factor = torch.cat([factor.expand(h), shared_constant(ones, factor, 2 * h)])  # of queries, keys and values
        weight = (self.qkv.weight.unflatten(0, (3 * h, -1)) * factor[:, None, None]).flatten(0, 1)
        bias = self.qkv.bias
        if bias is not None:
            bias = (bias.unflatten(0, (3 * h, -1)) * factor[:, None]).flatten()
        qkv = F.linear(x, weight, bias)
        q, k, v = qkv.unflatten(2, (3, h, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v, 1.0

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
        """Compute `F.scaled_dot_product_attention` with the temperature as its scale and without the diagonal."""
        n, m = q.shape[-2], k.shape[-2]
        if is_causal:
            attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril_()
        bias = self.diagonal(n, m, q)
        if attn_mask is not None:
            bias = merge_masks(bias, attn_mask)
        if self.temperature is None:
            return attend(q, k, v, bias, dropout_p, q.shape[-1] ** -0.5 if scale is None else scale)
        return attend(q * self.scale.to(q.dtype), k, v, bias, dropout_p)


class HiddenDiagonal(TorchFunctionMode):
    """Mode in which the softmax of scores masks the diagonal, and `Locality.attend` replaces the fused kernel.

    `alone` (w, n) marks tokens of windows that have nothing else to attend to, whose diagonal stays.
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
            n, m = scores.shape[-2:]
            bias = keep_alone(self.layer.diagonal(n, m, scores), self.alone)
            return function(add_bias(scores, bias), *args[1:], **kwargs)
        return function(*args, **kwargs)


class LocalitySelfAttention(Locality, Attention):
    """Multi-head locality self-attention, with the parameter names of `timm.layers.Attention`.

    Tokens (b, n, dim) to (b, n, dim). Parameters: `qkv`, `proj` and `temperature`, of shape (num_heads,).

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
        n = x.shape[1]
        if self.irreversible is not None and self.temperature is None and attn_mask is None and not is_causal:
            return Attention.forward(self, x, self.diagonal(n, n, x))  # fewest operations
        if not self.fused_attn or not is_plain(self.q_norm, nn.Identity):
            return super().forward(x, attn_mask, is_causal)
        q, k, v, scale = self.qkv_and_scale(x)
        bias = self.diagonal(n, n, q)
        if is_causal:
            attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_()
        if attn_mask is not None:
            bias = merge_masks(bias, attn_mask)
        y = attend(q, self.k_norm(k), v, bias, self.attn_drop.p if self.training else 0.0, scale)
        y = self.norm(y.transpose(1, 2).flatten(2))
        if (gate := getattr(self, "gate", None)) is not None:  # older versions of timm have none
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


def temperatures(model: nn.Module) -> dict[str, Float[Tensor, " h"]]:
    """Return the learned temperatures of every patched layer by name: one per head, or one for the layer."""
    return {
        name: module.temperature.detach()
        for name, module in model.named_modules()
        if isinstance(module, Locality) and module.temperature is not None
    }


def set_lsa_strength(model: nn.Module, strength: float) -> None:
    """Set the strength of the mask in layers patched with init="preserve", from 0 (plain attention) to 1 (LSA).

    It is stored in a buffer. A moving average of the model's state averages it too: set it on the average as well.

    Raises:
        ValueError: `strength` is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}: expected a number from 0 to 1")
    for module in model.modules():
        if isinstance(module, Locality) and module.diagonal_weight is not None:
            module.diagonal_weight.fill_(1 - strength)
