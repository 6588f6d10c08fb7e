"""A trained model as a folder that timm loads, the form in which the Hugging Face Hub has timm's models.

    timm.create_model("local-dir:FOLDER", pretrained=True)

config.json names architecture, arguments, preprocessing and classes; model.safetensors holds the weights, and what
smallvit's own files say of themselves. Models that timm builds alone need nothing else. Others, such as those with SPT
or LSA, have the architecture `smallvit_model`, which timm knows after `import smallvit.registry`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import is_model_in_modules

from smallvit import models, registry
from smallvit.checkpoint import snapshot
from smallvit.convnets import CIFAR_RESNETS
from smallvit.errors import first_line
from smallvit.exports.exported import own_metadata, require_same
from smallvit.files import replacing, write_text
from smallvit.ready import Ready
from smallvit.trained import ENTRY
from smallvit.variants import VARIANTS

WEIGHTS, CONFIG = "model.safetensors", "config.json"

KEPT = ("interpolation", "crop_pct", "crop_mode", "license", "origin_url", "paper_ids", "paper_name")
"""What timm's pretrained weights keep of what timm says of them."""


def write(model: Ready, folder: Path) -> None:
    """Write both files into a folder, which is there, and load the model from it.

    Raises:
        InputError: timm cannot load it, or gets another model; its weights are packed.
    """
    if model.card.packed:
        raise model.card.error("its weights are packed, which timm cannot load; export the run itself")
    write_text(folder / CONFIG, json.dumps(config(model), indent=2) + "\n")
    with replacing(folder / WEIGHTS) as partial:
        save_file(snapshot(model.model), partial, {"format": "pt"} | _entry(model))
    logger, level = logging.getLogger("timm"), logging.getLogger("timm").level
    try:
        logger.setLevel(logging.ERROR)
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # whatever one of a thousand constructors raises
        raise model.card.error(f"timm cannot load what was exported ({first_line(error)})") from None
    finally:
        logger.setLevel(level)
    require_same(model, loaded, "timm")


def is_timms(spec: dict[str, Any]) -> bool:
    """Whether timm alone builds the model with these arguments of `create_model`."""
    arch = spec["arch"]
    ours = arch in models.OURS or arch in CIFAR_RESNETS
    changed = any(spec.get(name) for name in ("spt", "lsa", "binary", "dist_token", *VARIANTS))
    return not (ours or changed or models.fitted_stride(arch, spec["img_size"], fit=spec.get("fit", True)))


def config(model: Ready) -> dict[str, Any]:
    """The contents of config.json."""
    spec = model.card.spec | {"img_size": model.img_size}
    alone = is_timms(spec)
    names = {"label_names": list(model.card.class_names)} if model.card.class_names else {}
    return {
        "architecture": spec["arch"] if alone else registry.ANY,
        "num_classes": spec["num_classes"],
        "num_features": model.model.num_features,
        **names,
        "model_args": _timm_arguments(spec) if alone else spec,
        "pretrained_cfg": _pretrained_cfg(model, timm.get_pretrained_cfg(spec["arch"]) if alone else None),
    }


def _timm_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments for a model that it builds alone, as `models` gives them."""
    arch, patch_size, arguments = spec["arch"], spec.get("patch_size"), {}
    family = next((name for name in models.TIMM_PATCH_ARGUMENTS if is_model_in_modules(arch, [name])), None)
    if patch_size is not None and family is not None:
        arguments |= models.TIMM_PATCH_ARGUMENTS[family](patch_size)
        if not spec.get("fit", True):
            arguments.pop("window_size", None)
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        arguments["img_size"] = spec["img_size"]
    return arguments


def _pretrained_cfg(model: Ready, own: timm.models.PretrainedCfg | None) -> dict[str, Any]:
    """Preprocessing, and the layers that other channels or classes change; `own` is what timm has for the name."""
    card, arch = model.card, model.card.spec["arch"]
    heads = sorted({name.rpartition(".")[0] for name in models.head_names(model.model)})
    fixed = own.fixed_input_size if own else arch not in (*CIFAR_RESNETS, "t2t")
    found = {
        "input_size": [model.in_chans, model.img_size, model.img_size],
        "fixed_input_size": fixed,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(card.mean),
        "std": list(card.std),
        "num_classes": card.spec["num_classes"],
        "first_conv": own and own.first_conv,
        "classifier": heads[0] if len(heads) == 1 else heads or None,
    }
    if card.tagged is None:
        return found
    theirs = timm.get_pretrained_cfg(card.tagged).to_dict()  # without what is not set
    return found | {name: theirs[name] for name in KEPT if name in theirs}


def _entry(model: Ready) -> dict[str, str]:
    metadata = own_metadata(model)
    return {} if metadata is None else {ENTRY: json.dumps(metadata, sort_keys=True)}
