"""Export trained models to other formats. Each file is written, loaded and verified before it gets its name.

onnx    an ONNX file for onnxruntime and other runtimes
pt2     a torch.export program for torch, without smallvit or timm
timm    a folder for timm.create_model
hub     the same with a model card, as on the Hugging Face Hub
packed  a weights file for smallvit with eight one-bit weights per byte

ONNX files and programs take normalized images, float32 (batch, channels, height, width) with any batch size, and return
logits (batch, classes). They contain the metadata of `verify.build_metadata`. Packed files have the metadata of the
run's weights file and are marked as packed; `plugins.pack` describes the format. All formats but packed come with
preprocess.py, which turns image files into inputs of the model.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from smallvit.evaluation.predictor import Predictor
from smallvit.export import timm_folder
from smallvit.export.quantize import Reduction, compare, reduce_precision
from smallvit.export.verify import (
    build_metadata,
    example_images,
    read_own_metadata,
    render_preprocess,
    verify_logits,
)
from smallvit.models.checkpoint import load_model, save_weights, snapshot
from smallvit.models.weights_info import PACKED
from smallvit.plugins.binary_packing import pack, packed_layers
from smallvit.plugins.sdpa import set_fused_attention
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import atomic_update, atomic_write, write_text

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
METADATA = "metadata.json"
"""Name of the extra file with metadata in a torch.export program."""
README = "README.md"
PREPROCESS = "preprocess.py"
"""Name of the module that preprocesses images, in the folder of every export but packed weights."""
FOLDER_FILES = (README, PREPROCESS, timm_folder.CONFIG, timm_folder.WEIGHTS)


def export_model(
    model: Predictor,
    form: str,
    path: Path,
    *,
    readme: str | None = None,
    overwrite: bool = False,
    reduction: Reduction | None = None,
    progress: Progress | None = None,
) -> str | None:
    """Export a model, which must be on the CPU in fp32; return a message for the user, if any.

    Args:
        model: The model.
        form: The format.
        path: The file or folder to write; other files in the folder stay.
        readme: The model card for the format "hub".
        overwrite: Replace preprocess.py of an earlier export.
        reduction: Precision of the format "onnx", if it is below fp32.
        progress: Where to show the progress of the comparison with fp32.

    Raises:
        InputError: the model cannot be exported, its outputs differ in the new format, or there is another
            preprocess.py.
    """
    if form == "packed":
        return write_packed(model, path)
    preprocess = render_preprocess(model)
    writers = {"onnx": write_onnx, "pt2": write_pt2}
    check_preprocess((path.parent if form in writers else path) / PREPROCESS, preprocess, overwrite=overwrite)
    if form in writers:
        message = None
        if reduction is None:
            writers[form](model, path)
        else:
            message = write_reduced(model, path, reduction, progress or Progress(disable=True))
        write_text(path.with_name(PREPROCESS), preprocess)
        return message
    with atomic_update(path, list_outputs) as partial:
        timm_folder.write_folder(model, partial)
        write_text(partial / PREPROCESS, preprocess)
        if readme is not None:
            write_text(partial / README, readme)
    return None


def check_preprocess(path: Path, text: str, *, overwrite: bool) -> None:
    """Check that preprocess.py can be written: it is missing, the same, or of an earlier export that is replaced.

    Raises:
        InputError: the file there is not by smallvit, or describes another export and is not to be replaced.
    """
    if not os.path.lexists(path):
        return
    existing = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    remedy = "choose another folder with --out"
    if not existing.startswith(text.partition(",")[0]):
        raise InputError(f"{path}: not written by smallvit export; rename it, or {remedy}")
    if existing != text and not overwrite:
        raise InputError(f"{path}: belongs to another export; {remedy}, or replace it with --overwrite")


def list_outputs(folder: Path) -> list[Path]:
    """List the files of an export in a folder."""
    return [folder / name for name in FOLDER_FILES if (folder / name).exists()]


def require_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        InputError: a package is missing.
    """
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install 'smallvit[onnx]'")


def write_onnx(model: Predictor, path: Path) -> None:
    """Write an ONNX file and verify it in onnxruntime.

    Raises:
        InputError: the model cannot be exported, as from 2 GiB on, or its logits differ in onnxruntime.
    """
    import onnxruntime

    with _explain_errors(model, "ONNX"):
        program = torch.onnx.export(
            _fused(model),
            (example_images(model, 2),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    program.model.metadata_props.update(build_metadata(model))
    with atomic_write(path) as partial:
        with _explain_errors(model, "ONNX"):
            program.save(partial)
            session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        verify_logits(model, run, "onnxruntime")


def write_reduced(model: Predictor, path: Path, reduction: Reduction, progress: Progress) -> str:
    """Write an ONNX file in fp16 or int8, and return a table that compares it with fp32.

    Raises:
        InputError: the model cannot be exported, or its logits are not finite.
    """
    with atomic_write(path) as partial:
        original = partial.with_name("fp32.onnx")
        write_onnx(model, original)
        with _explain_errors(model, f"ONNX in {reduction.precision}"):
            reduce_precision(original, partial, reduction)
        return compare(original, partial, reduction.test, progress).describe(reduction.precision)


def write_pt2(model: Predictor, path: Path) -> None:
    """Write a torch.export program and verify it in torch.

    Raises:
        InputError: the model cannot be exported, or its logits differ after loading.
    """
    with _explain_errors(model, "torch.export"):
        program = torch.export.export(
            _fused(model), (example_images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    with atomic_write(path) as partial:
        torch.export.save(program, partial, extra_files={METADATA: json.dumps(build_metadata(model), indent=2)})
        verify_logits(model, torch.export.load(partial).module(), "torch.export")


def write_packed(model: Predictor, path: Path) -> str:
    """Write the packed file, verify it by loading, and return a description of its size.

    Raises:
        InputError: the model has no one-bit weights, or its logits differ after loading.
    """
    try:
        packed = pack(copy.deepcopy(model.model))
    except ValueError as error:
        raise model.info.error(f"{error}; use another --format") from None
    with atomic_write(path) as partial:
        save_weights(partial, snapshot(packed), read_own_metadata(model) | {PACKED: True})
        try:
            loaded = load_model(partial)
        except InputError:  # BinaryViT pools keys by the image size
            reason = f"its layers at {model.img_size} pixels differ from those of the weights file; remove --img-size"
            raise model.info.error(reason) from None
        set_fused_attention(loaded, model.device.type, model.dtype)
        verify_logits(model, loaded, "smallvit", tolerance=0.0)
    return describe_size(packed, path.stat().st_size)


def describe_size(model: nn.Module, file: int) -> str:
    """Compare the bytes of a packed model's one-bit layers, and of its file of `file` bytes, to 32-bit floats."""
    layers = packed_layers(model)
    bits = sum(layer.bits.nbytes + layer.scale.nbytes for layer in layers)
    floats = sum(4 * layer.weight.numel() for layer in layers)
    parts = {f"weights of {len(layers)} one-bit layers": (bits, floats), "whole file": (file, file - bits + floats)}
    return "\n".join(
        f"{part}: {now:,} bytes instead of {before:,}, {before / now:.1f} times smaller"
        for part, (now, before) in parts.items()
    )


def _fused(model: Predictor) -> nn.Module:
    """Return the model fused for inference, with what it keeps after the first images."""
    fused = model.fused()
    fused.predict_logits(example_images(model, 1))
    return fused.model


@contextmanager
def _explain_errors(model: Predictor, form: str) -> Iterator[None]:
    """Turn any error of an exporter into a one-line InputError, and silence its warnings and logs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except Exception as error:  # exporters raise errors of any type
        raise model.info.error(f"cannot be exported to {form} ({first_line(error)})") from None
    finally:
        logging.disable(logging.NOTSET)
