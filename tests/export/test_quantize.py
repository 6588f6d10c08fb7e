"""Test ONNX exports in fp16 and int8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from smallvit import datasets
from smallvit.config.options import DataConfig
from smallvit.evaluation.predictor import load_predictor

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the shared run, a ViT with SPT and LSA on the digits."""
    return shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "digits-run")


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(["logits"], {"images": images})[0]


@pytest.mark.slow
def test_lower_precisions_are_compared_with_fp32(run: Path, smallvit: Command) -> None:
    test = datasets.create_dataset(DataConfig(data="digits")).test
    images = load_predictor(str(run), "export", device="cpu", amp="off").normalize(test.pixels).numpy()
    labels = test.labels.numpy()
    assert smallvit("export", run, "--format", "onnx")[0] == 0
    original = run / "export" / "digits-run.onnx"
    expected = run_onnx(original, images)
    metadata = {entry.key: entry.value for entry in onnx.load(original).metadata_props}
    for precision, tolerance in (("fp16", 0.02), ("int8", 0.3)):
        code, out, _ = smallvit("export", run, "--format", "onnx", "--precision", precision)
        path = run / "export" / f"digits-run.{precision}.onnx"
        lines = out.splitlines()
        assert (code, lines[0], lines[1].split()) == (0, str(path), ["fp32", precision])
        cells = dict(zip(("bytes", "top1", "agreement", "one", "batch"), map(str.split, lines[2:]), strict=True))
        logits = run_onnx(path, images)
        assert 0 < np.abs(logits - expected).max() < tolerance * np.abs(expected).max()
        correct = [100 * (each.argmax(1) == labels).mean() for each in (expected, logits)]
        assert cells["top1"][-2:] == [f"{value:.2f}" for value in correct]
        assert cells["agreement"][-1] == f"{100 * (logits.argmax(1) == expected.argmax(1)).mean():.2f}"
        assert cells["bytes"][-2:] == [f"{file.stat().st_size / 1e6:.2f}" for file in (original, path)]
        assert path.stat().st_size < original.stat().st_size
        model = onnx.load(path)
        assert metadata.items() <= {entry.key: entry.value for entry in model.metadata_props}.items()
        types = {onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}
        assert {"fp16": "FLOAT16", "int8": "INT8"}[precision] in types
        if precision == "int8":
            kernels = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.data_type == 3]
            assert all(np.abs(each.astype(int)).max() <= 64 for each in kernels)  # AVX2 saturates with 8 bits
    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert sorted(each.name for each in (run / "export").iterdir()) == sorted(
        ["digits-run.onnx", "digits-run.fp16.onnx", "digits-run.int8.onnx", "preprocess.py"]
    )


def test_precision_needs_onnx_and_images(run: Path, tmp_path: Path, smallvit: Command) -> None:
    weights = shutil.copy(run / "best.safetensors", tmp_path / "weights.safetensors")
    for arguments, message in (
        ([run, "--format", "pt2", "--precision", "int8"], "--precision int8 has no effect with --format pt2"),
        ([run, "--format", "onnx", "--data", "digits"], "--data has no effect without --precision int8 or fp16"),
        ([weights, "--format", "onnx", "--precision", "int8", "--out", tmp_path / "x.onnx"], "add --data"),
    ):
        code, _, err = smallvit("export", *arguments)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err
    assert not [*tmp_path.glob("*.onnx")]
