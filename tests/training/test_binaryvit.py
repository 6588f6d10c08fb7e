"""Training BinaryViT and other models with bits: recipe, teacher, resuming, evaluation, and the options' errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit import Config, InputError
from smallvit.config import recipes, spec
from smallvit.config.options import DistillConfig, OptimConfig
from smallvit.models import binaryvit, factory
from smallvit.plugins.binary_layers import Binary, BinaryAttending
from smallvit.runs.run import Run
from smallvit.training import losses
from smallvit.training import train as engine
from smallvit.training.setup import create_setup

from ..models.test_binaryvit import SMALL


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


QUICK = {"epochs": 2, "batch_size": 64, "train_fraction": 0.15}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Make the small BinaryViT smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(binaryvit.PYRAMIDS, "binaryvit_tiny", SMALL)
        yield


def train(out: Path, **options: object) -> engine.TrainResult:
    return engine.train(recipes.binaryvit(**QUICK | {"lr": 3e-3, "out": str(out)} | options))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "vit"
    return engine.train(Config.build(arch="vit", out=str(folder), **QUICK)).folder


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> engine.TrainResult:
    """Train an uninterrupted run with a teacher."""
    return train(tmp_path_factory.mktemp("runs") / "binary", teacher=str(teacher))


def weights(folder: Path) -> tuple[bytes, bytes]:
    return (folder / Run.LAST).read_bytes(), (folder / Run.BEST).read_bytes()


def binary_layers(model: nn.Module) -> int:
    return sum(isinstance(layer, Binary) for layer in model.modules())


def test_student_minimizes_the_cross_entropy_with_its_teacher_only(teacher: Path) -> None:
    """−Σ softmax(t) · log softmax(s), whatever the labels, augmentation's smoothing or anything else."""
    setup = create_setup(recipes.binaryvit(**QUICK, teacher=str(teacher)))
    ours = torch.randn(6, 10, dtype=torch.float32, requires_grad=True)
    theirs = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3
    actual = setup.objective(lambda images: images, ours, torch.rand(6, 10), theirs)["loss"]
    (gradient,) = torch.autograd.grad(actual, ours)
    shares = [[value / sum(row) for value in row] for row in theirs.exp().tolist()]
    loss = sum(
        -share * logit
        for row, own in zip(shares, ours.log_softmax(1), strict=True)
        for share, logit in zip(row, own, strict=True)
    ) / len(ours)
    (expected,) = torch.autograd.grad(loss, ours)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("labels", [0, 1])
def test_labels_do_not_count_with_all_of_the_weight(labels: int) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(3)[[labels] * 4]

    def loss(own: Tensor) -> Tensor:
        distill = DistillConfig(teacher="x", distill="soft", distill_weight=1.0, distill_temperature=1.0)
        objective = losses.create_objective(OptimConfig(label_smoothing=0.1), distill)
        return objective(lambda images: images, own, targets, logits)["loss"]

    assert loss(logits).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(logits + 5).item() == pytest.approx(0.0, abs=1e-6)


def test_recipe_has_no_weight_decay_warmup_or_other_regularization(teacher: Path) -> None:
    setup = create_setup(recipes.binaryvit(**QUICK, teacher=str(teacher)))
    assert {group["weight_decay"] for group in setup.optimizer.param_groups} == {0}
    setup.schedule.step_update(1)
    first = {group["lr"] for group in setup.optimizer.param_groups}
    assert len(first) == 1
    assert 0.8 * 5e-4 < first.pop() <= 5e-4
    setup.schedule.step_update(setup.steps)
    assert all(group["lr"] == pytest.approx(1e-5) for group in setup.optimizer.param_groups)
    assert not [layer for layer in setup.model.modules() if getattr(layer, "drop_prob", 0.0)]
    assert not [layer for layer in setup.model.modules() if isinstance(layer, nn.Dropout) and layer.p]
    config = setup.config.to_dict()
    assert (config["label_smoothing"], config["ema_decay"]) == (0, None)


def test_without_a_teacher_the_labels_teach() -> None:
    setup = create_setup(recipes.binaryvit(**QUICK))
    assert setup.teacher is None
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(10)[[3, 1, 4, 1]]
    loss = setup.objective(lambda images: images, logits, targets)["loss"]
    torch.testing.assert_close(loss, -logits.log_softmax(1)[range(4), [3, 1, 4, 1]].mean())


def test_a_run_learns_bits_and_is_loaded_with_them(finished: engine.TrainResult) -> None:
    lines = [json.loads(line) for line in (finished.folder / Run.METRICS).read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    model = smallvit.load_model(finished.folder)
    assert binary_layers(model) == 4 * 7 + 1 + 3  # blocks, the one with fewer keys, mergings
    steps = [layer.log_step.exp().item() for layer in model.modules() if isinstance(layer, BinaryAttending)]
    assert all(step != pytest.approx(0.005, abs=1e-7) for step in steps)
    assert any(layer.move.any() for layer in model.modules() if getattr(layer, "move", None) is not None)


@pytest.mark.slow
@pytest.mark.parametrize("calls", slow_except([2, 8], 2))
def test_resuming_gives_the_same_bytes(
    finished: engine.TrainResult,
    teacher: Path,
    tmp_path: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
    calls: int,
) -> None:
    with interrupted(calls):
        train(tmp_path / "run", teacher=str(teacher))
    result = engine.train(Config.build(resume=str(tmp_path / "run")))
    assert weights(result.folder) == weights(finished.folder)
    assert result.summary["test_top1"] == finished.summary["test_top1"]


@pytest.mark.slow
def test_runs_can_be_evaluated_and_reported(
    finished: engine.TrainResult, tmp_path: Path, smallvit: Callable[..., tuple]
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    code, out, err = smallvit("eval", folder)
    assert code == 0, err
    metrics = json.loads((folder / "eval" / "test" / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(finished.summary["test_top1"], abs=0.6)
    code, out, err = smallvit("report", folder)
    assert code == 0, err
    assert "binaryvit_tiny" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_trained_vit_can_get_bits_and_be_trained_further(teacher: Path, tmp_path: Path) -> None:
    options = {"init": str(teacher), "out": str(tmp_path / "after")}
    after = engine.train(Config.build(binary=True, **QUICK | {"epochs": 1}, **options)).load()
    created = factory.create_model("vit", img_size=8, num_classes=10, in_chans=1, plugins={"binary": True})
    assert binary_layers(after) == binary_layers(created) == 6 * 5
    assert list(after.state_dict()) == list(created.state_dict())


def test_bits_keep_the_weights_that_they_are_added_to(teacher: Path) -> None:
    setup = create_setup(Config.build(init=str(teacher), binary=True, **QUICK))
    plain, state = smallvit.load_model(teacher).state_dict(), setup.model.state_dict()
    assert plain.keys() < state.keys()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert any("binary added" in note for note in setup.initial.notes)
    assert not setup.model.blocks[0].attn.qkv.move.any()


def test_half_the_bits_can_be_added(teacher: Path) -> None:
    setup = create_setup(Config.build(init=str(teacher), binary=True, binary_attention=False, **QUICK))
    assert binary_layers(setup.model) == 6 * 4


# Rows and options


def test_the_ablation_goes_from_a_binary_deit_to_binaryvit() -> None:
    rows = [row.options for row in spec.expand_ablation(spec.parse_spec("binaryvit_tiny"))]
    parts = ("avg_pool_head", "pool_branches", "residual_affine", "pyramid")
    assert rows[:5] == [
        dict.fromkeys(parts, False),
        dict.fromkeys(parts[1:], False),
        dict.fromkeys(parts[2:], False),
        {"pyramid": False},
        {},
    ]
    assert rows[5] == {"binary_downsampling": False}
    assert rows[6] == dict.fromkeys(("binary_weights", "binary_activations", "binary_attention"), False)
    assert len(rows) == 7


def test_rows_of_the_ablation_keep_their_own_options_and_can_be_written_again() -> None:
    made = spec.expand_ablation(spec.parse_spec("binaryvit_tiny,lr=0.001,recipe=binaryvit"))
    assert all(row.options["lr"] == 0.001 and row.recipe == "binaryvit" for row in made)
    assert [spec.parse_spec(row.label) for row in made] == made
    assert len({row.folder(0) for row in made}) == 7
    for row in made:
        Config.build(**row.given({}, None))


@pytest.mark.parametrize("option", ["pyramid=false", "avg_pool_head=false", "binary_weights=false"])
def test_an_ablation_of_what_is_set_already_is_refused(option: str) -> None:
    with pytest.raises(InputError, match="--ablation sets"):
        spec.expand_ablation(spec.parse_spec(f"binaryvit_tiny,{option}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--binary", "--no-binary-weights", "--no-binary-activations", "--no-binary-attention"),
            "one-bit weights, activations and attention are all switched off",
        ),
        (("--no-pyramid",), "--no-pyramid: --arch vit96 is not a BinaryViT"),
        (("--arch", "vit", "--no-avg-pool-head"), "--no-avg-pool-head: --arch vit96"),
        (("--arch", "swin", "--binary"), "its maps have no one-bit form"),
        (("--arch", "swin", "--binary", "--no-binary-weights", "--no-binary-activations"), "--arch swin"),
        (("--arch", "binaryvit_tiny", "--lsa"), "--arch binaryvit_tiny"),
        (
            (
                "--arch",
                "binaryvit_tin",
            ),
            "did you mean 'binaryvit_tiny'",
        ),
        (("--arch", "binaryvit_tiny", "--img-size", "4"), "--img-size 4"),
        (("--arch", "binaryvit_tiny", "--img-size", "30", "--no-pyramid"), "--img-size 30"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_contradicting_options_give_an_error_of_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, smallvit: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = smallvit("train", *arguments, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_full_precision_by_options_is_a_run_without_bits() -> None:
    off = dict.fromkeys(("binary_weights", "binary_activations", "binary_attention"), False)
    setup = create_setup(recipes.binaryvit(**QUICK, **off))
    assert binary_layers(setup.model) == 0
