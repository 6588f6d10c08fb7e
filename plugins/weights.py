"""Loading weights of a plain timm model into a patched one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from smallvit.plugins.locality import Locality
from smallvit.plugins.patching import original, patched_layers
from smallvit.plugins.spt_exact import ShiftedViews


@dataclass(frozen=True)
class LoadReport:
    """Which parameters a checkpoint of the plain model did not fill, and which of its own found no place."""

    new: tuple[str, ...]
    """Names that only the patched model has; they keep their initial values."""
    unused: tuple[str, ...]
    """Names that only the plain model has; `unpatch` brings them back."""

    def __str__(self) -> str:
        return (
            f"{len(self.new)} new: {', '.join(self.new)}\n{len(self.unused)} without a place: {', '.join(self.unused)}"
        )


def load_base(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Load the `state_dict` of a plain timm model into the same model patched, and report exactly the new keys.

    Raises:
        ValueError: the weights lack a parameter that no plugin introduced, or have one that the plain model has
            not, or one of another shape. The model is then unchanged.
    """
    new, originals = _introduced(model), _originals(model)
    own = model.state_dict()
    expected = {name: value.shape for name, value in own.items() if name not in new} | {
        name: value.shape for name, value in originals.items()
    }
    for name, shape in expected.items():
        if name not in state_dict:
            raise ValueError(f"the weights lack {name}, which the unpatched model has")
        if state_dict[name].shape != shape:
            came = tuple(state_dict[name].shape)
            raise ValueError(f"{name} has shape {came} in the weights, {tuple(shape)} in the model")
    if extra := sorted(state_dict.keys() - expected.keys()):
        raise ValueError(f"the weights hold {extra[0]}, which the unpatched model has not")
    model.load_state_dict({name: state_dict[name] for name in own if name not in new}, strict=False)
    for name, value in originals.items():
        value.copy_(state_dict[name])
    return LoadReport(tuple(name for name in own if name in new), tuple(originals))


def _introduced(model: nn.Module) -> set[str]:
    """Names in the model's state that the plugins brought."""
    names = set()
    for plugin, prefix, layer in patched_layers(model):
        if plugin == "binary":
            names |= {f"{prefix}.{name}" for name in layer.state_dict() if name.split(".")[0] in layer.brought}
        elif isinstance(layer, Locality | ShiftedViews):
            own = {"temperature", "openness", "shifted"} & (layer._parameters.keys() | layer._buffers.keys())
            names |= {f"{prefix}.{name}" for name in own if getattr(layer, name) is not None}
        else:
            names |= {f"{prefix}.{name}" for name in layer.state_dict()}
    return names


def _originals(model: nn.Module) -> dict[str, Tensor]:
    """State of the layers that SPT replaced, under their names in the plain model."""
    return {
        f"{prefix}.{name}": value
        for _, prefix, layer in patched_layers(model)
        if original(layer) is not None
        for name, value in original(layer).state_dict().items()
    }
