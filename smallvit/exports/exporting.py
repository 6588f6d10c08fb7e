"""Trained models for other programs: written aside, tried there against the model, and only then given their names.

onnx    an ONNX file: onnxruntime, and what is built on it
pt2     a program of torch.export: torch, without smallvit or timm
timm    a folder that timm loads
hub     the same with a model card, as the Hugging Face Hub has it
packed  a weights file with eight one-bit weights to a byte: smallvit
"""

from __future__ import annotations

import os
from pathlib import Path

from smallvit.errors import InputError
from smallvit.exports import graphs, model_card, packed, timm_folder
from smallvit.files import replacing_folder, write_text
from smallvit.ready import Ready
from smallvit.runs import Run
from smallvit.trained import SUFFIX

FILES = {"onnx": graphs.write_onnx, "pt2": graphs.write_pt2, "packed": packed.write}
"""Forms that are one file."""
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "packed": SUFFIX}
NAMES = SUFFIXES | {"packed": packed.SUFFIX}
"""How the names of files end, and how they do where nobody names them."""
FOLDERS = ("timm", "hub")
README = "README.md"
OURS = {timm_folder.WEIGHTS, timm_folder.CONFIG, README}
"""What an exported folder holds."""


def destination(name: str, form: str, out: str | None, *, overwrite: bool) -> Path:
    """Where an exported model goes: to `out`, or into the folder of the run that `name` is.

    Raises:
        InputError: `name` is no run's folder and there is no `out`, its name does not fit, its folder is not there, or
            something is there that is not to be replaced.
    """
    run = Path(os.path.expanduser(name))
    if out is None and not os.path.isdir(run):
        raise InputError(f"export {name}: not a run's folder, so nothing says where to; give --out")
    own = f"{os.path.basename(os.path.realpath(run))}{NAMES[form]}" if form in FILES else form
    path = run / Run.EXPORT / own if out is None else Path(os.path.expanduser(out))
    shown = f"--out {path}"
    if form in FILES and path.suffix.lower() != SUFFIXES[form]:
        raise InputError(f"{shown}: expected a name that ends in {SUFFIXES[form]}")
    if out is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{shown}: no such folder as {path.absolute().parent}")
    if os.path.lexists(path):
        if not overwrite:
            raise InputError(f"{shown}: exists already; choose another name, or --overwrite")
        _require_replaceable(path, shown, folder=form in FOLDERS)
        if form == "packed":
            packed.require_packed(path, shown)
    return path


def export(
    model: Ready,
    form: str,
    path: Path,
    *,
    run: Path | None = None,
    terms: str | None = None,
    repository: str | None = None,
) -> str | None:
    """Write a model, which is on the CPU in fp32, whole or not at all; returns what there is to say of it.

    The card of `hub` tells of the folder of its `run`, of `terms`, the identifier of its weights' license, and of its
    `repository`.

    Raises:
        InputError: the model cannot be exported, answers otherwise in its new form, or there is no run to tell of.
    """
    path.parent.mkdir(exist_ok=True)  # RUN/export
    if form in FILES:
        return FILES[form](model, path)
    card = model_card.text(model, run, terms, repository) if form == "hub" else None
    with replacing_folder(path) as partial:
        timm_folder.write(model, partial)
        if card is not None:
            write_text(partial / README, card)
    return None


def _require_replaceable(path: Path, shown: str, *, folder: bool) -> None:
    """Check that only what was exported before would be lost.

    Raises:
        InputError: something else would be.
    """
    if os.path.isdir(path) != folder or os.path.islink(path):
        raise InputError(f"{shown}: {'not a' if folder else 'a'} folder, or a link; choose another name")
    if folder and (others := sorted({*os.listdir(path)} - OURS)):
        raise InputError(f"{shown}: holds {others[0]}, which is not of an export; choose another folder")
