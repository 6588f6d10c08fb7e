"""Muon and AdaMuon as timm has them, for all matrices of a shape at once and in a chosen precision.

timm orthogonalizes one matrix after another in bfloat16. The blocks of a transformer share their shapes, and CPUs
without bfloat16 units emulate it: there, timm's step takes as long as the forward and backward passes of a small model.
Matrices of a shape and of the transposed shape, such as the two of an MLP, are orthogonalized together.

Axes: n matrices of one shape, o i their rows and columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from timm.optim.muon import (
    _COEFFICIENTS,
    Muon,
    _is_suitable_for_muon,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)
from torch import Tensor, nn

RMS = 0.2
"""Root mean square of the entries of an update at a learning rate of 1, as with AdamW.

Source: Liu et al. 2025, arXiv:2502.16982.
"""


class BatchedMuon(Muon):
    """Update matrices as timm's `Muon` does, with its state and options; other parameters are left to it.

    Muon is Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; AdaMuon is Si et al. 2025, arXiv:2507.11005.

    Args:
        optimizer: timm's `Muon`, whose groups and defaults it takes. Convolutions are flattened, and updates are scaled
            as AdamW's ("match_rms_adamw"), timm's defaults.
        dtype: Precision of the Newton-Schulz iteration.
    """

    def __init__(self, optimizer: Muon, dtype: torch.dtype) -> None:
        super().__init__(optimizer.param_groups, **optimizer.defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step; gradients are not changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            chosen = [each for each in group["params"] if each.grad is not None and _is_suitable_for_muon(each)]
            if chosen:
                self._update(group, chosen)
            gradients |= {parameter: parameter.grad for parameter in chosen}
        for parameter in gradients:  # so that timm updates the others alone
            parameter.grad = None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update the matrices of a group."""
        gradients = [parameter.grad for parameter in parameters]
        adaptive = group.get("algo") == "adamuon"
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"use_muon": True, "momentum_buffer": torch.zeros_like(parameter)}
                if adaptive:
                    state |= {"step": torch.tensor(0.0), "exp_avg_sq": torch.zeros_like(parameter)}
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        matrices = [update.flatten(1) for update in updates]
        for index, matrix in enumerate(matrices):
            shapes[tuple(matrix.shape)].append(index)
        stacks = {shape: torch.stack([matrices[index] for index in indices]) for shape, indices in shapes.items()}
        for shape, directions in self._orthogonalize_all(group, stacks):
            chosen = [parameters[index] for index in shapes[shape]]
            if adaptive:
                directions = self._adapt(group, chosen, directions)
                scale = RMS * math.prod(shape) ** 0.5
            else:
                scale = RMS * max(shape) ** 0.5
            each = _unstack(directions.to(chosen[0].dtype), chosen)
            torch._foreach_add_(chosen, each, alpha=-group["lr"] * scale)

    def _orthogonalize_all(
        self, group: dict[str, Any], stacks: dict[tuple[int, int], Float[Tensor, "n o i"]]
    ) -> Iterator[tuple[tuple[int, int], Float[Tensor, "n o i"]]]:
        """Yield each shape and its orthogonalized matrices; a matrix has the transpose of its transpose's."""
        for (rows, columns), stack in stacks.items():
            transposed = stacks.get((columns, rows)) if rows != columns and not group["scale_eps"] else None
            if transposed is None:
                yield (rows, columns), self._orthogonalize(group, stack)
            elif rows < columns:
                both = self._orthogonalize(group, torch.cat([stack, transposed.mT]))
                yield (rows, columns), both[: len(stack)]
                yield (columns, rows), both[len(stack) :].mT.contiguous()

    def _orthogonalize(self, group: dict[str, Any], updates: Float[Tensor, "n o i"]) -> Float[Tensor, "n o i"]:
        return zeropower_via_newtonschulz(
            updates,
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=self.dtype,
            scale_eps=group["scale_eps"],
        )

    def _adapt(
        self, group: dict[str, Any], parameters: list[nn.Parameter], directions: Float[Tensor, "n o i"]
    ) -> Float[Tensor, "n o i"]:
        """Divide by the root of the entries' mean squares over the steps, and by the norm of each matrix."""
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        mean_squares, decay = [state["exp_avg_sq"] for state in states], group["betas"][1]
        each = _unstack(directions.to(parameters[0].dtype), parameters)
        torch._foreach_mul_(mean_squares, decay)
        torch._foreach_addcmul_(mean_squares, each, each, value=1 - decay)
        adapted = directions / torch.stack([each.flatten(1) for each in mean_squares]).sqrt().add(group["eps"])
        return adapted / (adapted.norm(dim=(1, 2), keepdim=True) + group["eps"])


def _unstack(matrices: Float[Tensor, "n o i"], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the matrices in the shapes of the parameters."""
    return [matrix.view(parameter.shape) for matrix, parameter in zip(matrices.unbind(), parameters, strict=True)]
