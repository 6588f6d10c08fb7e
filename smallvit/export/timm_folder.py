"""Export a model as a folder for timm, in the format of timm's models on the Hugging Face Hub.

    timm.create_model("local-dir:FOLDER", pretrained=True)

config.json holds architecture, arguments, preprocessing and class names; model.safetensors holds the weights with
smallvit's metadata. Models that timm cannot build alone, such as those with plugins, have the architecture
`smallvit_model`, which `import smallvit.models.timm_registry` registers in timm.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import is_model_in_modules

from smallvit.config.model import ArchOptions
from smallvit.evaluation.predictor import Predictor
from smallvit.export.verify import read_own_metadata, verify_logits
from smallvit.models import factory, timm_registry
from smallvit.models.architectures import CIFAR_RESNETS, OURS
from smallvit.models.checkpoint import snapshot
from smallvit.models.weights_info import ENTRY
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import atomic_write, write_text
from smallvit.utils.sizes import height_width

WEIGHTS, CONFIG = "model.safetensors", "config.json"

DEFAULTS = asdict(ArchOptions())
COPIED = ("license", "origin_url", "paper_ids", "paper_name")
"""Fields of timm's configuration that its pretrained weights keep."""


def write_folder(model: Predictor, folder: Path) -> None:
    """Write both files to an existing folder and verify the model that timm loads from it.

    Raises:
        InputError: the weights are packed, timm cannot load the model, or its logits differ.
    """
    if model.info.packed:
        raise model.info.error("its weights are packed, which timm cannot load; export the run itself")
    write_text(folder / CONFIG, json.dumps(build_config(model), indent=2) + "\n")
    metadata = read_own_metadata(model)
    entry = {} if metadata is None else {ENTRY: json.dumps(metadata, sort_keys=True)}
    with atomic_write(folder / WEIGHTS) as partial:
        save_file(snapshot(model.model), partial, {"format": "pt"} | entry)
    logger, level = logging.getLogger("timm"), logging.getLogger("timm").level
    try:
        logger.setLevel(logging.ERROR)
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # model constructors raise errors of any type
        raise model.info.error(f"timm cannot load the exported model ({first_line(error)})") from None
    finally:
        logger.setLevel(level)
    verify_logits(model, loaded, "timm")


def is_timm_model(spec: dict[str, Any]) -> bool:
    """Return whether timm alone can build the model with these arguments of `create_model`."""
    arch = spec["arch"]
    ours = arch in OURS or arch in CIFAR_RESNETS
    changed = bool(spec.get("plugins")) or any(spec.get(name, value) != value for name, value in DEFAULTS.items())
    return not (ours or changed or factory.adapted_stride(arch, spec["img_size"], fit=spec.get("fit", True)))


def build_config(model: Predictor) -> dict[str, Any]:
    """Return the contents of config.json."""
    spec = model.info.spec | {"img_size": model.img_size}
    is_timm = is_timm_model(spec)
    names = {"label_names": list(model.info.class_names)} if model.info.class_names else {}
    if model.info.gray_ranges:
        names["gray_ranges"] = model.info.gray_ranges.to_json()
    if model.info.multi_label:
        names |= {"activation": "sigmoid", "thresholds": list(model.info.thresholds)}
    return {
        "architecture": spec["arch"] if is_timm else timm_registry.ANY,
        "num_classes": spec["num_classes"],
        "num_features": model.model.num_features,
        **names,
        "model_args": _timm_arguments(spec) if is_timm else spec,
        "pretrained_cfg": _pretrained_cfg(model, timm.get_pretrained_cfg(spec["arch"]) if is_timm else None),
    }


def _timm_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm.create_model for a model that timm can build alone."""
    arch, patch_size, arguments = spec["arch"], spec.get("patch_size"), {}
    family = next((name for name in factory.TIMM_PATCH_ARGUMENTS if is_model_in_modules(arch, [name])), None)
    if patch_size is not None and family is not None:
        arguments |= factory.TIMM_PATCH_ARGUMENTS[family](patch_size)
        if not spec.get("fit", True):
            arguments.pop("window_size", None)
    if timm.get_pretrained_cfg(arch).fixed_input_size:
        arguments["img_size"] = spec["img_size"]
    return arguments


def _pretrained_cfg(model: Predictor, own: timm.models.PretrainedCfg | None) -> dict[str, Any]:
    """Return preprocessing and the names of first and last layer; `own` is timm's configuration of the architecture."""
    info, arch = model.info, model.info.spec["arch"]
    heads = sorted({name.rpartition(".")[0] for name in factory.classifier_parameter_names(model.model)})
    fixed = own.fixed_input_size if own else arch not in (*CIFAR_RESNETS, "t2t")
    config = {
        "input_size": [model.in_chans, *height_width(model.img_size)],
        "fixed_input_size": fixed,
        **info.resizing,
        "mean": list(info.mean),
        "std": list(info.std),
        "num_classes": info.spec["num_classes"],
        "first_conv": own and own.first_conv,
        "classifier": heads[0] if len(heads) == 1 else heads or None,
    }
    if info.timm_name is None:
        return config
    pretrained = timm.get_pretrained_cfg(info.timm_name).to_dict()  # only fields that are set
    return config | {name: pretrained[name] for name in COPIED if name in pretrained}


def push_to_hub(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a repository OWNER/NAME of the Hugging Face Hub, created if needed; return its URL.

    Raises:
        InputError: there is no token, or the Hub cannot be reached or refuses. The folder is kept.
    """
    from huggingface_hub import HfApi, get_token

    try:
        if get_token() is None:
            raise InputError("not logged in; run hf auth login, or set HF_TOKEN")
        api = HfApi(library_name="smallvit")
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Model exported by smallvit")
    except Exception as error:  # of the Hub, its HTTP library or the disk
        raise InputError(f"--push {repository}: {first_line(error)} (the export is kept in {folder})") from None
    return str(url)
