"""timm's pretrained weights: which there are, where they lie, and the models that hold them.

They come from the Hugging Face hub, by its own client: huggingface.co, or the mirror that HF_ENDPOINT names, to the
cache that HF_HOME names. Only safetensors are asked for. With SMALLVIT_OFFLINE set, the cache alone is looked into.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg
from torch import nn

from smallvit import models
from smallvit.errors import InputError, first_line, nearest
from smallvit.headers import shapes
from smallvit.published import PUBLISHED
from smallvit.trained import PRETRAINED, SUFFIX, Card

IMAGENET = "imagenet-1k"
"""timm's name of the data set that is `imagenet` here."""
FILE = "model" + SUFFIX


def card(name: str, option: str) -> Card:
    """The card of the weights that timm knows by a name: a model's, with or without the weights' tag.

    Raises:
        InputError: it knows none, or none that can be had as safetensors, or none for square images.
    """
    model = name.removesuffix(PRETRAINED)
    bare = Card(name=name, option=option, path=None)
    if not timm.models.is_model_pretrained(model):
        tagged = timm.list_pretrained()
        known = timm.is_model(timm.models.get_arch_name(model))
        why = "timm has no pretrained weights by this name" if known else "no such file, folder or model of timm's"
        raise bare.error(why + nearest(model, [*tagged, *map(timm.models.get_arch_name, tagged)]))
    cfg = timm.get_pretrained_cfg(model)
    if not cfg.hf_hub_id or not _file(cfg).endswith(SUFFIX):
        raise bare.error(f"these weights are not published as safetensors, and nothing else is read; see {cfg.url}")
    subset = infer_imagenet_subset({"num_classes": cfg.num_classes})
    return replace(
        _card(bare, cfg),
        class_names=subset and tuple(ImageNetInfo(subset).label_names()),
        data="imagenet" if subset == IMAGENET else subset,
    )


def of_file(bare: Card, arch: str) -> Card:
    """The card of another program's weights file, which holds one of timm's models: `arch`, with or without a tag.

    The number of classes is that of the file's classifier, 0 where it has none; image size, mean and standard deviation
    are those that timm has for the name.

    Raises:
        InputError: timm has no such model.
    """
    base = timm.models.get_arch_name(arch)
    models.require_known(base)
    if base in PUBLISHED:
        raise bare.error(f"another program's file holds one of timm's models, not --arch {arch}")
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError:
        raise InputError(f"--arch {arch}: no such weights{nearest(arch, timm.list_pretrained(base + '.*'))}") from None
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or [None])[0]
    shape = shapes(bare.path).get(f"{classifier}.weight", (0,))
    return _card(bare, replace(cfg, num_classes=shape[0]))


def load(card: Card) -> nn.Module:
    """The model that a card describes, built and filled by timm, in evaluation mode.

    Raises:
        InputError: the weights cannot be downloaded, or are another model's.
    """
    path = card.path or fetch(card)
    overlay = {"file": str(path), "custom_load": False, "num_classes": card.spec["num_classes"]}
    try:
        model = timm.create_model(card.tagged, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever one of a thousand filters and constructors raises at other weights
        raise card.error(f"{path.name} does not fit {card.tagged} ({first_line(error)})") from None
    return model.eval()


def fetch(card: Card) -> Path:
    """Where timm's weights lie; they are downloaded first, unless they were before.

    Raises:
        InputError: they cannot be.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    cfg = timm.get_pretrained_cfg(card.tagged)
    repository, _, revision = cfg.hf_hub_id.partition("@")
    offline = os.environ.get("SMALLVIT_OFFLINE", "") not in ("", "0")
    try:
        return Path(hf_hub_download(repository, _file(cfg), revision=revision or None, local_files_only=offline))
    except errors.LocalEntryNotFoundError:
        reason = "offline, as SMALLVIT_OFFLINE says" if offline else "no answer from there, and not downloaded before"
    except errors.RepositoryNotFoundError:
        reason = "no such repository there, or one that asks for a login"
    except errors.EntryNotFoundError:
        reason = "no such file there"
    except Exception as error:  # the client's own, its HTTP library's, the disk's
        reason = first_line(error)
    raise card.error(
        f"{constants.ENDPOINT}/{repository} {_file(cfg)} cannot be had ({reason}); name a mirror by HF_ENDPOINT, or "
        f"give the downloaded file{SUFFIX} with --arch {card.spec['arch']}"
    )


def _card(bare: Card, cfg: PretrainedCfg) -> Card:
    """What timm's configuration says."""
    channels, height, width = cfg.input_size
    if height != width:
        raise bare.error(f"it takes images of {height} × {width} pixels; only square ones are supported")
    spec = {"arch": cfg.architecture, "img_size": height, "in_chans": channels, "num_classes": cfg.num_classes}
    return replace(
        bare,
        tagged=f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture,
        spec=spec | {"patch_size": None, "fit": False},
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def _file(cfg: PretrainedCfg) -> str:
    return cfg.hf_hub_filename or FILE
