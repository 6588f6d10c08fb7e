"""Add a distillation token: a second token next to the class token, with its own head, trained by a teacher.

DeiT (Touvron et al. 2021, arXiv:2012.12877), section 4. The class token's head learns the labels, the distillation
token's the teacher's choices; at inference the two are averaged: their logits, as in DeiT's code, or their
probabilities, as in its paper.

Differs from timm: any ViT or PiT that has a class token can be given one, trained weights included, and there is a
choice of averages. timm's own distilled classes stay unchanged.

Axes: b batch, n tokens (class, distillation, then patches), c token width, k classes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smallvit.plugins.patch import UnsupportedModelError

STD = 0.02
"""Standard deviation of a new token, its position embedding and its head, as in DeiT."""


def average_probabilities(logits: Float[Tensor, "s b k"]) -> Float[Tensor, "b k"]:
    """Return log-probabilities of the mean of s models' probabilities."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


class TwoHeads:
    """Mixin of models with a distillation token.

    In training they return the logits of both heads, class first, if `set_distilled_training(True)` was called; else
    logits (b, k).
    """

    average: Literal["logits", "probabilities"] = "logits"

    @staticmethod
    def refusal(model: nn.Module) -> str | None:
        """Return why a model of a supported class cannot have a token, if it cannot."""
        return None if model.global_pool == "token" else "its head does not read the class token"

    def forward_head(self, x: Float[Tensor, "b n c"], pre_logits: bool = False) -> Any:
        """Return logits (b, k), both heads' in distilled training; with `pre_logits` the two tokens' mean (b, c)."""
        x, taught = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + taught) / 2
        heads = self.head(x), self.head_dist(taught)
        if self.distilled_training and self.training:
            return heads
        return average_probabilities(torch.stack(heads)) if self.average == "probabilities" else sum(heads) / 2


class DistilledViT(TwoHeads, VisionTransformerDistilled):
    """timm's ViT or DeiT with a distillation token."""

    @staticmethod
    def refusal(model: nn.Module) -> str | None:
        """Return a reason for ViTs without a class token or with registers."""
        if model.cls_token is None or getattr(model, "num_reg_tokens", 0):
            return "it has no class token, or register tokens"
        return TwoHeads.refusal(model)

    def add_token(self) -> None:
        """Insert the token, and its position embedding if any, behind those of the class token."""
        like = self.cls_token
        self.dist_token = _normal(torch.empty_like(like))
        if self.pos_embed is not None and not self.no_embed_class:
            own = _normal(torch.empty_like(like))
            positions = torch.cat([self.pos_embed[:, :1], own, self.pos_embed[:, 1:]], dim=1)
            self.pos_embed = nn.Parameter(positions.detach(), self.pos_embed.requires_grad)
        self.num_prefix_tokens += 1


class DistilledPiT(TwoHeads, PoolingVisionTransformer):
    """timm's PiT with a distillation token."""

    def add_token(self) -> None:
        """Append the token to the class token's parameter, as in timm."""
        tokens = torch.cat([self.cls_token, _normal(torch.empty_like(self.cls_token))], dim=1)
        self.cls_token = nn.Parameter(tokens.detach(), self.cls_token.requires_grad)
        self.num_tokens += 1


KINDS: dict[type[nn.Module], type[TwoHeads]] = {
    VisionTransformer: DistilledViT,
    VisionTransformerDistilled: DistilledViT,
    DistilledViT: DistilledViT,
    PoolingVisionTransformer: DistilledPiT,
    DistilledPiT: DistilledPiT,
}
"""Model classes that support a token, and their new classes."""


def add_distillation_token(model: nn.Module, average: Literal["logits", "probabilities"] = "logits") -> nn.Module:
    """Add a distillation token and its head to a model, patched or not, in place, and return it.

    `average` is what inference averages. A model that has them keeps its weights. Outputs of a trained model change
    slightly, because of one more token to attend to and a new head.

    Raises:
        UnsupportedModelError: the model does not support it.
    """
    kind = KINDS.get(type(model))
    reason = "only ViT, DeiT and PiT support it" if kind is None else kind.refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"this {type(model).__name__} takes no distillation token: {reason}")
    has_head = getattr(model, "head_dist", None) is not None
    model.__class__ = kind
    if not has_head:
        model.head_dist, model.distilled_training = new_head(model.head), False
        with torch.no_grad():
            model.add_token()
    model.average = average
    return model


def set_distilled_training(model: nn.Module, enable: bool = True) -> bool:
    """Set whether training returns the logits of both heads; return whether the model has two."""
    distilled = getattr(model, "head_dist", None) is not None
    if distilled:
        model.set_distilled_training(enable)
    return distilled


def new_head(head: nn.Module) -> nn.Module:
    """Return another head of the same size, newly initialized."""
    if not isinstance(head, nn.Linear):
        return nn.Identity()  # of a model without classes
    like = head.weight
    new = nn.Linear(head.in_features, head.out_features, head.bias is not None, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(new.weight, std=STD)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new.train(head.training)


def _normal(values: Tensor) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(values, std=STD))
