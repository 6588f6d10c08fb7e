"""A distillation token: beside the class token, with a head of its own, taught by another model.

DeiT (Touvron et al. 2021, arXiv:2012.12877), section 4. The class token's head learns the labels, the distillation
token's the teacher's choices; at inference the two are averaged: their logits, as in DeiT's code, or their
probabilities, as in its paper.

Differs from timm: any ViT or PiT that has a class token can be given one, trained weights included, and there is a
choice of averages. timm's own distilled classes are taken as they are.

Axes: b batch, n tokens (class, distillation, then patches), c token width, k classes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smallvit.plugins.patching import UnsupportedModelError

STD = 0.02
"""Of a new token, its position and its head: DeiT's."""


def mean_probabilities(logits: Float[Tensor, "s b k"]) -> Float[Tensor, "b k"]:
    """Log-probabilities of the mean of s models' probabilities."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


class TwoHeads:
    """What a model with a distillation token has beside the class that it extends.

    In training it gives both heads' logits, class first, if `set_distilled_training(True)` was called; else one (b, k).
    """

    kinds: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}
    """Classes that can be given a token, and what they become."""
    average: Literal["logits", "probabilities"] = "logits"

    def __init_subclass__(cls, plain: tuple[type[nn.Module], ...] = (), **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if plain:  # not what others derive, such as FSDP
            TwoHeads.kinds |= dict.fromkeys((*plain, cls), cls)

    @staticmethod
    def refusal(model: nn.Module) -> str | None:
        """Why a model of a class that fits cannot have a token, if it cannot."""
        return None if model.global_pool == "token" else "its head does not read the class token"

    def add_token(self) -> None:
        """Give the model its token and head, now that it is of this class."""
        raise NotImplementedError

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether both heads' logits come apart in training."""
        self.distilled_training = enable

    def forward_head(self, x: Float[Tensor, "b n c"], pre_logits: bool = False) -> Any:
        """Logits (b, k) of tokens, both heads' in distilled training; with `pre_logits` the two tokens' mean (b, c)."""
        x, taught = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + taught) / 2
        heads = self.head(x), self.head_dist(taught)
        if self.distilled_training and self.training:
            return heads
        return mean_probabilities(torch.stack(heads)) if self.average == "probabilities" else sum(heads) / 2


class DistilledViT(TwoHeads, VisionTransformerDistilled, plain=(VisionTransformer, VisionTransformerDistilled)):
    """timm's ViT or DeiT with a distillation token."""

    @staticmethod
    def refusal(model: nn.Module) -> str | None:
        """ViTs without a class token, or with registers, have no place for it."""
        if model.cls_token is None or getattr(model, "num_reg_tokens", 0):
            return "it has no class token, or others beside it"
        return TwoHeads.refusal(model)

    def add_token(self) -> None:
        """The token stands behind the class token; its position, where that has one, too."""
        like = self.cls_token
        self.dist_token = _normal(torch.empty_like(like))
        if self.pos_embed is not None and not self.no_embed_class:
            own = _normal(torch.empty_like(like))
            positions = torch.cat([self.pos_embed[:, :1], own, self.pos_embed[:, 1:]], dim=1)
            self.pos_embed = nn.Parameter(positions.detach(), self.pos_embed.requires_grad)
        self.num_prefix_tokens += 1


class DistilledPiT(TwoHeads, PoolingVisionTransformer, plain=(PoolingVisionTransformer,)):
    """timm's PiT with a distillation token."""

    def add_token(self) -> None:
        """The token is a second row of the class token's parameter, as in timm."""
        tokens = torch.cat([self.cls_token, _normal(torch.empty_like(self.cls_token))], dim=1)
        self.cls_token = nn.Parameter(tokens.detach(), self.cls_token.requires_grad)
        self.num_tokens += 1


def add_distillation_token(model: nn.Module, average: Literal["logits", "probabilities"] = "logits") -> nn.Module:
    """Give a model, patched or not, a distillation token and its head, in place, and return it.

    `average` is what inference averages. A model that has them keeps its weights. Outputs of a trained model change a
    little, as there is one more token to attend to and a new head.

    Raises:
        UnsupportedModelError: the model has no place for it.
    """
    kind = TwoHeads.kinds.get(type(model))
    reason = "only ViT, DeiT, PiT and T2T have a place for it" if kind is None else kind.refusal(model)
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
    """Have a model give both heads' logits in training; returns whether it has two."""
    distilled = getattr(model, "head_dist", None) is not None
    if distilled:
        model.set_distilled_training(enable)
    return distilled


def new_head(head: nn.Module) -> nn.Module:
    """Another head of the same size, freshly initialised."""
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
