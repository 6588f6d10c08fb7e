"""Load initial weights, adapting them to another image size, other classes or added plugins."""

from __future__ import annotations

from collections.abc import Mapping
from operator import ge
from typing import Any

import torch
from jaxtyping import Int
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smallvit.config.model import ArchOptions
from smallvit.config.options import DataConfig
from smallvit.datasets.dataset import ImageDataset
from smallvit.evaluation.predictor import check_test_split
from smallvit.models import factory, weights_info
from smallvit.models import weights as trained
from smallvit.models.weights_info import WeightsInfo
from smallvit.plugins.patch import misfit
from smallvit.plugins.resize import set_input_size
from smallvit.training.optim import InitialWeights
from smallvit.utils.errors import first_line
from smallvit.utils.sizes import ImageSize, height_width


def load_initial_weights(
    model: nn.Module,
    spec: dict[str, Any],
    name: str,
    dataset: ImageDataset,
    config: DataConfig,
    *,
    shrink: bool = False,
) -> InitialWeights:
    """Load the weights of `name` into a model that was created from `spec`.

    Position embeddings and relative position tables are interpolated to the model's image size. Plugins that the
    weights do not have are initialized as `spec` says. Heads keep their random weights if the classes differ.

    Args:
        shrink: The weights are a larger model's, of which evenly spaced ones are selected.

    Raises:
        InputError: The weights are another model's, are packed, take other images, or may have seen the test images.
    """
    card = trained.identify_weights(weights_info.read_weights_info(name, "--init"), spec)
    own = card.spec
    if card.packed:
        raise card.error("its weights are packed to one bit each and cannot be trained; give the run itself")
    channels = dataset.in_chans if card.timm_name else None
    if not channels:
        trained.check_channels(card, dataset)
    warnings = check_test_split(card, dataset, config)
    source = trained.load_trained_model(card, channels)
    notes = [own["arch"], *warnings]
    if own["in_chans"] != dataset.in_chans:
        notes.append(f"first layer from {own['in_chans']} to {dataset.in_chans} channels, as timm does")
    if shrink:
        _resample_patches(source, model)
    if own["img_size"] != spec["img_size"]:
        _resize(source, model, spec["img_size"], card)
        notes.append(f"from {own['img_size']} to {spec['img_size']} pixels")
    strides = [
        factory.adapted_stride(each["arch"], each["img_size"], fit=each.get("fit", True)) for each in (own, spec)
    ]
    if strides[0] != strides[1]:
        notes.append(f"stride {strides[0] or 'own'} becomes {strides[1] or 'own'} to fit the images")
    loaded = list(source.parameters())
    options = ArchOptions(dist_token=spec["dist_token"], dist_average=spec["dist_average"])
    factory.equip(source, spec["arch"], spec["plugins"], spec["init"], options)
    notes += [f"{name} added" for name in spec["plugins"] if name not in own.get("plugins", {})]
    notes += ["dist_token added"] if spec["dist_token"] and not own.get("dist_token") else []
    fresh = factory.classifier_parameter_names(model)
    if _same_classes(card, own, dataset):
        fresh = {each for each in fresh if each not in source.state_dict()}
    else:
        notes.append(f"new heads for {spec['num_classes']} classes")
    if spec.get("pos_embed") == "sincos":
        fresh = {*fresh, "pos_embed"}  # computed for its size, not interpolated
    weights = source.state_dict()
    if shrink:
        weights = select_weights(weights, {name: value.shape for name, value in model.state_dict().items()})
        notes.append(f"weights selected for {spec['arch']}")
    _load(model, weights, fresh, card)
    known = {id(parameter) for parameter in loaded}
    added = {each for each, parameter in source.named_parameters() if id(parameter) not in known}
    new = tuple(each for each, _ in model.named_parameters() if each in added | fresh)
    return InitialWeights((f"{name}: " + ", ".join(notes),), weights_info.compute_fingerprint(card), new)


def select_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return evenly spaced slices of a larger model's tensors, in the shapes of a smaller model of its family.

    The smaller model's first blocks take those of the larger one. Tensors that do not exist in both, or have another
    number of dimensions, are left out. Source: weight selection, arXiv:2311.18823.
    """
    selected = {}
    for name, shape in shapes.items():
        tensor = weights.get(name)
        if tensor is not None and tensor.ndim == len(shape) and all(map(ge, tensor.shape, shape)):
            for axis, size in enumerate(shape):
                tensor = tensor.index_select(axis, _spaced(tensor.shape[axis], size).to(tensor.device))
            selected[name] = tensor
    return selected


def _spaced(count: int, size: int) -> Int[Tensor, " size"]:
    """Return `size` evenly spaced indices below `count`."""
    if count % size == 0:
        return torch.arange(size) * (count // size)
    return torch.linspace(0, count - 1, size).round().long()


def _resize(model: nn.Module, like: nn.Module, img_size: ImageSize, card: WeightsInfo) -> None:
    """Change a model's image size to that of a second model, if it has a fixed one."""
    try:
        if isinstance(model, SwinTransformer | SwinTransformerV2):
            # without a size, timm scales the windows with the image
            model.set_input_size(height_width(img_size), window_size=like.layers[0].blocks[0].window_size)
        else:
            set_input_size(model, img_size)
    except TypeError:
        return  # weights for one size only do not fit the new model, which `_load` reports
    except (ValueError, AssertionError, RuntimeError) as error:
        raise card.error(f"cannot take images of {img_size} pixels ({first_line(error)})") from None


def _resample_patches(model: nn.Module, like: nn.Module) -> None:
    """Change a ViT's patch size to that of a second model."""
    embeddings = [getattr(each, "patch_embed", None) for each in (model, like)]
    sizes = [getattr(each, "patch_size", None) for each in embeddings]
    if isinstance(model, VisionTransformer) and None not in sizes and sizes[0] != sizes[1]:
        model.set_input_size(img_size=embeddings[1].img_size, patch_size=sizes[1])


def _same_classes(card: WeightsInfo, own: dict[str, Any], dataset: ImageDataset) -> bool:
    """Return whether the weights were trained on the dataset's classes."""
    if card.class_names is not None:
        return card.class_names == dataset.class_names
    return card.data in (None, dataset.name) and own["num_classes"] == len(dataset.class_names)


def _load(model: nn.Module, weights: dict[str, Tensor], fresh: set[str], card: WeightsInfo) -> None:
    """Load weights, except the parameters named in `fresh`."""
    expected = {name: value for name, value in model.state_dict().items() if name not in fresh}
    loaded = {name: weights[name] for name in expected.keys() & weights.keys()}
    if reason := misfit(loaded, expected):
        raise card.error(f"does not fit this model ({reason})")
    model.load_state_dict(loaded, strict=False)
