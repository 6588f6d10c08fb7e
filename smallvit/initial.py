"""Which weights a model begins with: trained ones, perhaps of another image size, of other classes or without its
plugins; and which of them stay as they are."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smallvit import bare, models, trained
from smallvit.datasets.images import ImageDataset
from smallvit.errors import InputError, first_line
from smallvit.inherit import ADDED
from smallvit.options import DataConfig
from smallvit.plugins import set_input_size
from smallvit.trained import Card

BACKBONE = "backbone"
"""What `--freeze` calls all but the heads."""


def begin(model: nn.Module, spec: dict[str, Any], name: str, dataset: ImageDataset, config: DataConfig) -> str:
    """Give a model, made from `spec`, the weights that `name` stands for; returns what was done, in words.

    Learnt positions and tables of relative positions are interpolated for the model's image size; plugins that the
    weights have not begin as `spec` says, and heads as they are where the classes are others.

    Raises:
        InputError: the weights are another model's, are packed, take other images, or may have learnt the test's.
    """
    card = bare.identified(trained.card(name, "--init"), spec)
    own = card.spec
    if card.packed:
        raise card.error("each of its weights is packed to a bit, and training needs them whole; give the run itself")
    trained.require_channels(card, dataset)
    trained.require_same_test(card, dataset, config)
    source = trained.load(card)
    notes = [own["arch"]]
    if trained.has_changed(card, dataset, config):
        notes.append(f"{dataset.name} has changed since it learnt from it, so it may know images of the test")
    if own["img_size"] != spec["img_size"]:
        _resize(source, model, spec["img_size"], card)
        notes.append(f"from {own['img_size']} to {spec['img_size']} pixels")
    strides = [models.fitted_stride(each["arch"], each["img_size"], fit=each.get("fit", True)) for each in (own, spec)]
    if strides[0] != strides[1]:
        notes.append(f"stride {strides[0] or 'of its own'} becomes {strides[1] or 'its own'}, as fits the images")
    models.equip(source, spec["arch"], **{each: spec[each] for each in models.EQUIPMENT})
    notes += [f"{plugin} added" for plugin in ADDED if spec[plugin] and not own.get(plugin)]
    fresh = models.head_names(model)
    if _same_classes(card, own, dataset):
        fresh = {each for each in fresh if each not in source.state_dict()}
    else:
        notes.append(f"new heads for {spec['num_classes']} classes")
    if spec.get("sincos"):
        fresh = {*fresh, "pos_embed"}  # those of its own size, not interpolated ones
    _fill(model, source.state_dict(), fresh, card)
    return f"{name}: " + ", ".join(notes)


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Keep the parameters whose names match from being trained.

    Raises:
        InputError: a pattern matches none, or all are frozen.
    """
    heads = models.head_names(model)
    for pattern in patterns:
        matched = [
            parameter
            for name, parameter in model.named_parameters()
            if (name not in heads if pattern == BACKBONE else fnmatchcase(name, pattern))
        ]
        if not matched:
            names = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"--freeze {pattern}: the model has no such parameters; it consists of {names}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"--freeze {','.join(patterns)}: nothing is left to train")


def still_norms(model: nn.Module) -> tuple[nn.Module, ...]:
    """Batch norms that are frozen: their statistics stay as they are, too."""
    return tuple(norm for norm in model.modules() if isinstance(norm, _BatchNorm) and _is_frozen(norm))


def _is_frozen(layer: nn.Module) -> bool:
    parameters = list(layer.parameters(recurse=False))
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _resize(model: nn.Module, like: nn.Module, img_size: int, card: Card) -> None:
    """Make a model take images of another size, as a second one does; one that takes any is left alone."""
    try:
        if isinstance(model, SwinTransformer | SwinTransformerV2):
            model.patch_embed.set_input_size(img_size=(img_size, img_size))
            _set_windows(model, like)
        else:
            set_input_size(model, img_size)
    except TypeError:
        return  # what was made for one size alone does not fit the new model, and is found out there
    except (ValueError, AssertionError, RuntimeError) as error:
        raise card.error(f"cannot take images of {img_size} pixels ({first_line(error)})") from None


def _set_windows(model: nn.Module, like: nn.Module) -> None:
    """Windows of the sizes they have in another Swin; timm's way of changing the image size scales them with it."""
    windows = {name: module.window_size for name, module in like.named_modules() if hasattr(module, "set_window_size")}
    for name, size in windows.items():
        attention = model.get_submodule(name)
        if attention.window_size != size:
            attention.set_window_size(size)


def _same_classes(card: Card, own: dict[str, Any], dataset: ImageDataset) -> bool:
    """Whether the weights tell the data's classes apart."""
    if card.class_names is not None:
        return card.class_names == dataset.class_names
    return card.data in (None, dataset.name) and own["num_classes"] == len(dataset.class_names)


def _fill(model: nn.Module, weights: dict[str, Tensor], fresh: set[str], card: Card) -> None:
    """Load weights, but for the parameters named in `fresh`."""
    state = model.state_dict()
    for name, value in state.items():
        if name not in fresh and (name not in weights or weights[name].shape != value.shape):
            came = f"has {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise card.error(f"does not fit this model ({name} {came}, {tuple(value.shape)} is wanted)")
    model.load_state_dict({name: weights[name] for name in state if name not in fresh}, strict=False)
