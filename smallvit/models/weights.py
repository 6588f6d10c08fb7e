"""Load trained models by name: runs, files of this and other programs, and timm's pretrained weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from jaxtyping import Float
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg
from torch import Tensor, nn

from smallvit.models import checkpoint, factory
from smallvit.models.architectures import LEE2021
from smallvit.models.weights_info import PRETRAINED, RESIZING, WeightsInfo, read_shapes
from smallvit.plugins.patch import misfit
from smallvit.utils.errors import InputError, first_line, suggest
from smallvit.utils.files import SUFFIX
from smallvit.utils.sizes import image_size

if TYPE_CHECKING:
    from smallvit.datasets.dataset import ImageDataset

IMAGENET = "imagenet-1k"
"""timm's name of the data set `imagenet`."""
FILE = "model" + SUFFIX


def load_trained_model(info: WeightsInfo, in_chans: int | None = None) -> nn.Module:
    """Build a model and load its weights: on the CPU, in evaluation mode, at its own image size.

    Args:
        in_chans: Channels to which timm adapts the first layer of its models.

    Raises:
        InputError: The weights do not fit the model, cannot be downloaded, or do not name their model.
    """
    if info.spec is None:
        raise info.error("this file of another program does not name its model")
    if info.timm_name is not None:
        return load_pretrained(info, in_chans)
    if info.class_names is None:
        model = factory.create_model(**info.spec)
        model.load_state_dict(checkpoint.read_tensors(info.path))
        return model.eval()
    try:
        return checkpoint.load_model(info.path)
    except InputError as error:
        raise info.error(str(error)) from None


def extract_features(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Compute the pooled features before the classifier; for distilled models, the mean of both tokens."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    if features.ndim == 3:  # tokens (b, n, d)
        return features.mean(dim=1)
    return features.flatten(2).mean(dim=2) if features.ndim > 3 else features  # maps (b, d, h, w)


def check_channels(info: WeightsInfo, dataset: ImageDataset) -> None:
    """Check that a model takes images with as many channels as a data set's.

    Raises:
        InputError: It does not.
    """
    expected, actual = info.spec["in_chans"], dataset.in_chans
    if expected != actual:
        remedy = "; add --in-chans 1" * (expected == 1)
        raise info.error(
            f"the model takes images with {expected} channels, those of {dataset.name} have {actual}{remedy}"
        )


def check_classifier(info: WeightsInfo) -> None:
    """Check that a model has a classifier.

    Raises:
        InputError: It only computes features.
    """
    if not info.spec["num_classes"]:
        raise info.error("these weights have no classifier; smallvit probe evaluates their features")


def identify_weights(info: WeightsInfo, spec: dict[str, Any]) -> WeightsInfo:
    """Check which model a weights file of another program holds: that of `spec`, or timm's of the same name.

    The number of classes is that of the file's classifier.

    Raises:
        InputError: The weights belong to another model.
    """
    if info.spec is not None:
        return info
    weights = checkpoint.read_tensors(info.path)
    heads = factory.classifier_parameter_names(factory.create_model(**spec)) & weights.keys()
    spec = spec | {"num_classes": max((len(weights[name]) for name in heads), default=0)}
    reason = misfit(weights, factory.create_model(**spec).state_dict())
    if reason is None:
        return replace(info, spec=spec)
    if timm.is_model(spec["arch"]):
        return describe_file(info, spec["arch"])
    raise info.error(
        f"not the weights of --arch {spec['arch']} ({reason}); repeat its plugins, --img-size and --patch-size"
    )


def read_timm_info(name: str, option: str) -> WeightsInfo:
    """Describe timm's pretrained weights by a model's name, with or without the weights' tag.

    Raises:
        InputError: timm has no such weights, or none in safetensors.
    """
    model = name.removesuffix(PRETRAINED)
    info = WeightsInfo(name=name, option=option, path=None)
    if not timm.models.is_model_pretrained(model):
        tagged = timm.list_pretrained()
        known = timm.is_model(timm.models.get_arch_name(model))
        why = "timm has no pretrained weights by this name" if known else "no such file, folder or timm model"
        raise info.error(why + suggest(model, [*tagged, *map(timm.models.get_arch_name, tagged)]))
    cfg = timm.get_pretrained_cfg(model)
    if not cfg.hf_hub_id or not _filename(cfg).endswith(SUFFIX):
        raise info.error(f"these weights are not published as safetensors, the only format that is read; see {cfg.url}")
    subset = infer_imagenet_subset({"num_classes": cfg.num_classes})
    return replace(
        _add_pretrained_cfg(info, cfg),
        class_names=subset and tuple(ImageNetInfo(subset).label_names()),
        data="imagenet" if subset == IMAGENET else subset,
    )


def describe_file(info: WeightsInfo, arch: str) -> WeightsInfo:
    """Describe a weights file of another program that holds the timm model `arch`, with or without a tag.

    The number of classes is that of the file's classifier, 0 if there is none; image size, mean and standard deviation
    are timm's.

    Raises:
        InputError: timm has no such model.
    """
    base = timm.models.get_arch_name(arch)
    factory.require_known(base)
    if base in LEE2021:
        raise info.error(f"a file of another program holds a timm model, not --arch {arch}")
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError:
        raise InputError(f"--arch {arch}: no such weights{suggest(arch, timm.list_pretrained(base + '.*'))}") from None
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or [None])[0]
    shape = read_shapes(info.path).get(f"{classifier}.weight", (0,))
    return _add_pretrained_cfg(info, replace(cfg, num_classes=shape[0]))


def load_pretrained(info: WeightsInfo, in_chans: int | None = None) -> nn.Module:
    """Build a timm model and load its pretrained weights, in evaluation mode.

    Raises:
        InputError: The weights cannot be downloaded, or belong to another model.
    """
    path = info.path or download(info)
    overlay = {"custom_load": False, "num_classes": info.spec["num_classes"]}
    try:
        overlay["state_dict"] = checkpoint.read_tensors(path)
        options = {} if in_chans in (None, info.spec["in_chans"]) else {"in_chans": in_chans}
        model = timm.create_model(info.timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's filters and constructors raise anything for other weights
        raise info.error(f"{path.name} does not fit {info.timm_name} ({checkpoint.shorten(error)})") from None
    model.pretrained_cfg["state_dict"] = None  # frees a second copy
    return model.eval()


def download(info: WeightsInfo) -> Path:
    """Download timm's weights unless they are cached; return their path.

    Raises:
        InputError: They cannot be downloaded.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    cfg = timm.get_pretrained_cfg(info.timm_name)
    repository, _, revision = cfg.hf_hub_id.partition("@")
    offline = os.environ.get("SMALLVIT_OFFLINE", "") not in ("", "0")
    try:
        return Path(hf_hub_download(repository, _filename(cfg), revision=revision or None, local_files_only=offline))
    except errors.LocalEntryNotFoundError:
        reason = "SMALLVIT_OFFLINE is set" if offline else "the server does not respond, and they are not cached"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or one that requires a login"
    except errors.EntryNotFoundError:
        reason = "no such file"
    except Exception as error:  # of the client, its HTTP library or the disk
        reason = first_line(error)
    raise info.error(
        f"{constants.ENDPOINT}/{repository} {_filename(cfg)} cannot be downloaded ({reason}); set HF_ENDPOINT to "
        f"a mirror, or give a downloaded {SUFFIX} file with --arch {info.spec['arch']}"
    )


def _add_pretrained_cfg(info: WeightsInfo, cfg: PretrainedCfg) -> WeightsInfo:
    """Add the metadata in timm's configuration of a model."""
    channels, height, width = cfg.input_size
    spec = {
        "arch": cfg.architecture,
        "img_size": image_size(height, width),
        "in_chans": channels,
        "num_classes": cfg.num_classes,
    }
    return replace(
        info,
        timm_name=f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture,
        spec=spec | {"patch_size": None, "fit": False},
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        resizing={name: getattr(cfg, name) for name in RESIZING},
    )


def _filename(cfg: PretrainedCfg) -> str:
    return cfg.hf_hub_filename or FILE
