"""Check evaluation in parts that fit into memory, and of several models in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smallvit import Config, datasets
from smallvit.datasets.loader import evaluation_batches
from smallvit.evaluation import evaluate as module
from smallvit.evaluation.evaluate import BatchParts, evaluate, evaluate_models
from smallvit.evaluation.multilabel import evaluate_multilabel
from smallvit.evaluation.predictor import load_predictor
from smallvit.models.factory import create_model
from smallvit.training.setup import Setup
from smallvit.training.train import train
from smallvit.utils import hardware
from smallvit.utils.errors import TrainingError
from smallvit.utils.hardware import PeakMemory

CPU = torch.device("cpu")
FP32 = (CPU, torch.float32)


class Limited(nn.Module):
    """A model that runs out of memory with more than `limit` images."""

    def __init__(self, limit: int, error: Exception | None = None) -> None:
        super().__init__()
        self.model = create_model(arch="vit", img_size=8, in_chans=1, num_classes=10)
        self.limit, self.sizes = limit, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > self.limit:
            raise self.error
        return self.model(images)


def batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return evaluation_batches(datasets.create_dataset(Config.build().data), "test", CPU, size)


def test_parts_are_halved_until_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    for error in (None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        model, parts = Limited(30, error), BatchParts()
        (figures,) = evaluate_models([model], batches(100), *FP32, parts=parts)
        assert figures == pytest.approx(evaluate(model.model, batches(100), *FP32), abs=1e-4)
        assert model.sizes[:6] == [100, 50, 25, 25, 25, 25]
        assert max(model.sizes[6:]) == parts.size == 25
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == (
            "smallvit: warning: out of memory in the evaluation of 100 images; continuing with 50 at a time"
        )
        assert len(lines) == 2


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(TrainingError, match="evaluation of a single image: try a smaller --img-size"):
        evaluate(Limited(0), batches(3), *FP32)
    with pytest.raises(RuntimeError, match="another error"):
        evaluate(Limited(0, RuntimeError("another error")), batches(3), *FP32)


def test_processes_that_share_weights_do_not_halve_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_sharded", lambda model: True)
    with pytest.raises(TrainingError, match="give --eval-batch-size 50, or less"):
        evaluate(Limited(99), batches(100), *FP32)


def test_models_are_evaluated_in_one_pass_as_apart() -> None:
    torch.manual_seed(0)
    models = [create_model(arch="vit", img_size=8, in_chans=1, num_classes=10) for _ in range(2)]
    read = iter(list(batches(100)))
    together = evaluate_models([models[0].train(), models[1].eval()], read, *FP32)
    assert together == [evaluate(model, batches(100), *FP32) for model in models]
    assert together[0] != together[1]
    assert [model.training for model in models] == [True, False]
    sets = torch.eye(10)
    together = evaluate_multilabel(models, batches(100), sets, *FP32)
    assert together == [evaluate_multilabel([model], batches(100), sets, *FP32)[0] for model in models]


def test_training_reads_validation_images_once_for_weights_and_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[str, int]] = []
    original = Setup.evaluation_batches

    def record(self: Setup, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in original(self, split):
            passes.append((split, len(images)))
            yield images, labels

    monkeypatch.setattr(Setup, "evaluation_batches", record)
    options = {"arch": "vit", "patch_size": 4, "epochs": 1, "ema_decay": 0.9, "train_fraction": 0.1, "batch_size": 32}
    run = train(Config.build(**options, eval_batch_size=100, out=str(tmp_path / "run")))
    assert passes == [("val", 100), ("val", 43), *[("test", 100)] * 3, ("test", 59)]
    assert run.summary["test_images"] == 359


def test_predictions_halve_their_batches(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = load_predictor(str(trained_run), "eval", device="cpu", amp="off")
    images = torch.randn(8, 1, 8, 8)
    expected = predictor.predict_logits(images)
    limited = Limited(4)
    limited.model = predictor.model
    object.__setattr__(predictor, "model", limited)
    torch.testing.assert_close(predictor.predict_logits(images), expected, atol=1e-5, rtol=0)
    assert "continuing with 4 at a time" in capsys.readouterr().err
    assert predictor.batch_size == 4


def test_peaks_of_training_and_evaluation_are_apart_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"peak": 10, "used": 2}

    def reset(device: torch.device) -> None:
        now["peak"] = now["used"]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    peaks = PeakMemory(torch.device("cuda", 0))
    assert (peaks.training, peaks.evaluation) == (10, None)
    with peaks.evaluating():
        now["peak"] = 30
    assert (peaks.training, peaks.evaluation) == (10, 30)
    now["peak"] = 12
    with peaks.evaluating():
        now["peak"] = 20
    assert (peaks.training, peaks.evaluation) == (12, 30)


def test_cpus_have_one_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda device: 7)
    peaks = PeakMemory(CPU)
    with peaks.evaluating():
        pass
    assert (peaks.training, peaks.evaluation) == (7, None)
