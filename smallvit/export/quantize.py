"""Reduce the precision of an exported ONNX model, and compare it with fp32 on a test split.

fp16    weights and arithmetic in half precision; inputs and outputs stay float32
int8    static quantization by onnxruntime: matrix products and convolutions take 8-bit weights, quantized by channel,
        and 8-bit activations, whose ranges are those of calibration images

Axes: b batch, c channels, h w pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import Progress

from smallvit.evaluation.evaluator import EvaluationTask
from smallvit.utils.errors import InputError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PRECISIONS = ("fp32", "fp16", "int8")
CALIBRATION_IMAGES = 512
QUANTIZED = ["MatMul", "Gemm", "Conv"]
"""Operators in int8. With all that onnxruntime can quantize, top-1 of a model fell from 41.5 to 1.0 %."""
BATCH_SIZES = (1, 64)
"""Batch sizes to time."""
ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A precision below fp32, and the images it needs."""

    precision: str
    """fp16 or int8."""
    calibration: EvaluationTask
    """The images to calibrate int8 on."""
    test: EvaluationTask
    """The images to compare with fp32 on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model in fp32 and in another precision, in this order, on the same images."""

    images: int
    bytes: tuple[int, int]
    metric: str
    """top-1, or mAP for images with several labels."""
    scores: tuple[float, float]
    """The metric in percent."""
    agreement: float
    """Equal predictions, in percent."""
    milliseconds: dict[int, tuple[float, float]]
    """Median time of a batch by its size, measured by turns."""

    def describe(self, precision: str) -> str:
        """Return a table as text."""
        rows = [("", "fp32", precision)]
        rows.append(("size, MB", *(f"{size / 1e6:.2f}" for size in self.bytes)))
        rows.append((f"{self.metric} of {self.images:,} test images, %", *(f"{value:.2f}" for value in self.scores)))
        rows.append(("equal predictions, %", "", f"{self.agreement:.2f}"))
        for size, pair in self.milliseconds.items():
            what = f"{size} images" if size > 1 else "1 image"
            rows.append((f"{what} in onnxruntime, ms", *(f"{value:.2f}" for value in pair)))
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}}" + "".join(f"{value:>10}" for value in values) for name, *values in rows)


def reduce_precision(source: Path, target: Path, reduction: Reduction) -> None:
    """Write an ONNX model in fp16 or int8; the metadata stays.

    Args:
        source: The ONNX file in fp32.
        target: The file to write.
        reduction: The precision.
    """
    import onnx

    if reduction.precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)
        return
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = calibration_batches(reduction.calibration)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(batches, None)
            return None if images is None else {"images": images}

    prepared = target.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        Reader(),
        op_types_to_quantize=QUANTIZED,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # 7 bits, as sums of two products saturate 16 bits on CPUs with AVX2 only
    )
    prepared.unlink()


def calibration_batches(task: EvaluationTask) -> Iterator[Float[np.ndarray, "b c h w"]]:
    """Yield a random choice of a task's images, normalized; it is the same each time."""
    chosen = np.random.default_rng(0).permutation(sum(map(len, task.parts)))[:CALIBRATION_IMAGES]
    for pixels, indices in task.batches():
        if len(selected := pixels[np.isin(indices.numpy(), chosen)]):
            yield task.predictor.normalize(selected).numpy()


def compare(original: Path, converted: Path, task: EvaluationTask, progress: Progress) -> Comparison:
    """Run two ONNX models on the same images in onnxruntime, and time them by turns.

    Raises:
        InputError: The logits of the converted model are not finite, or no image can be decoded.
    """
    from onnxruntime import InferenceSession

    sessions = [InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (original, converted)]
    parts: list[list[np.ndarray]] = []
    for pixels, indices in progress.track(task.batches(), len(task), description="images of test"):
        images = task.predictor.normalize(pixels).numpy()
        parts.append([indices.numpy(), *(session.run(["logits"], {"images": images})[0] for session in sessions)])
    if not parts:
        raise InputError("none of the images can be decoded")
    indices, *logits = (np.concatenate(each) for each in zip(*parts, strict=True))
    if not np.isfinite(logits[1]).all():
        raise task.predictor.info.error("the logits are not finite in this --precision; choose another")
    first, second = (task.collect_outputs(torch.from_numpy(each), torch.from_numpy(indices)) for each in logits)
    several = task.dataset.label_sets is not None
    decided = [each > 0 if several else each.argmax(1) for each in logits]
    return Comparison(
        images=len(indices),
        metric="mAP" if several else "top-1",
        bytes=(original.stat().st_size, converted.stat().st_size),
        scores=(first.score, second.score),
        agreement=100 * float((decided[0] == decided[1]).mean()),
        milliseconds={size: _time_by_turns(sessions, images[:1].repeat(size, axis=0)) for size in BATCH_SIZES},
    )


def _time_by_turns(sessions: list[InferenceSession], images: Float[np.ndarray, "b c h w"]) -> tuple[float, float]:
    """Return the median milliseconds of each session."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, times in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(["logits"], {"images": images})
            times.append(time.perf_counter() - start)
    first, second = (1000 * statistics.median(times) for times in seconds)
    return first, second
