"""A trained model as a graph that needs none of its code: ONNX, or a program of torch.export.

Both take normalised images, float32 (batch, channels, height, width), in batches of any size, and give logits
(batch, classes). What an application must know beside is in the file: `exported.description`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from smallvit.errors import InputError, first_line
from smallvit.exports.exported import description, example, require_same
from smallvit.files import replacing
from smallvit.ready import Ready

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages for ONNX."""
LARGEST = 2**31 - 2**24
"""Bytes of weights that a single ONNX file can hold."""
METADATA = "metadata.json"
"""Of torch.export's extra files, the one that describes the model."""


def require_onnx() -> None:
    """Check that what writes ONNX files, and what tries them, is installed.

    Raises:
        InputError: it is not.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"--format onnx needs {', '.join(missing)}: pip install 'smallvit[onnx]'")


def write_onnx(model: Ready, path: Path) -> None:
    """Write an ONNX file, tried in onnxruntime.

    Raises:
        InputError: the model cannot be exported, is too large, or answers otherwise there.
    """
    import onnxruntime

    if sum(value.nbytes for value in model.model.state_dict().values()) > LARGEST:
        raise model.card.error("too large for one ONNX file, which holds 2 GiB; give --format pt2")
    with _explained(model, "ONNX"):
        program = torch.onnx.export(
            model.model,
            (example(model, 2),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    program.model.metadata_props.update(description(model))
    with replacing(path) as partial:
        program.save(partial)
        with _explained(model, "ONNX"):
            session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        require_same(model, run, "onnxruntime")


def write_pt2(model: Ready, path: Path) -> None:
    """Write a program of torch.export, tried by torch.

    Raises:
        InputError: the model cannot be exported, or answers otherwise when it is loaded again.
    """
    with _explained(model, "torch.export"):
        program = torch.export.export(
            model.model, (example(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    with replacing(path) as partial:
        torch.export.save(program, partial, extra_files={METADATA: json.dumps(description(model), indent=2)})
        require_same(model, torch.export.load(partial).module(), "torch.export")


@contextmanager
def _explained(model: Ready, form: str) -> Iterator[None]:
    """Say in one line why a model cannot be exported, without what its exporter logs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except Exception as error:  # whatever one of a thousand models provokes
        raise model.card.error(f"cannot be exported to {form} ({first_line(error)})") from None
    finally:
        logging.disable(logging.NOTSET)
