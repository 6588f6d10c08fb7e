"""Training BinaryViT and other models with bits: recipe, teacher, resuming, judging, and the options' errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit import Config, InputError, binaryvit, engine, models, objectives, recipes
from smallvit.binaryvit import Size
from smallvit.comparison import rows
from smallvit.plugins.binary import Binary, BinaryAttending
from smallvit.runs import Run
from smallvit.setup import prepare

SMALL = Size(
    widths=(8, 16, 32, 64), depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), mlp_ratios=(4, 4, 2, 2), reductions=(8, 4, 1, 1)
)
QUICK = {"epochs": 2, "batch_size": 64, "train_fraction": 0.15}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """The small BinaryViT is smaller still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(binaryvit.PYRAMIDS, "binaryvit_tiny", SMALL)
        yield


def train(out: Path, **options: object) -> engine.Result:
    return engine.train(recipes.binaryvit(**QUICK | {"lr": 3e-3, "out": str(out)} | options))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "vit"
    return engine.train(Config.build(arch="vit", out=str(folder), **QUICK)).folder


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> engine.Result:
    """An uninterrupted run that is taught."""
    return train(tmp_path_factory.mktemp("runs") / "binary", teacher=str(teacher))


def weights(folder: Path) -> tuple[bytes, bytes]:
    return (folder / Run.LAST).read_bytes(), (folder / Run.BEST).read_bytes()


def binary_layers(model: nn.Module) -> int:
    return sum(isinstance(layer, Binary) for layer in model.modules())


def test_a_taught_student_minimises_the_cross_entropy_with_its_teacher_alone(teacher: Path) -> None:
    """−Σ softmax(t) · log softmax(s), whatever the labels, augmentation's smoothing or anything else."""
    setup = prepare(recipes.binaryvit(**QUICK, teacher=str(teacher)))
    ours = torch.randn(6, 10, dtype=torch.float32, requires_grad=True)
    theirs = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3
    found = setup.objective(lambda images: images, ours, torch.rand(6, 10), theirs)["loss"]
    (gradient,) = torch.autograd.grad(found, ours)
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
        options = {"smoothing": 0.1, "soft": True, "weight": 1.0, "temperature": 1.0}
        return objectives.distilled(lambda images: images, own, targets, logits, **options)["loss"]

    assert loss(logits).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(logits + 5).item() == pytest.approx(0.0, abs=1e-6)


def test_the_recipe_has_no_weight_decay_no_warm_up_and_no_other_regularisation(teacher: Path) -> None:
    setup = prepare(recipes.binaryvit(**QUICK, teacher=str(teacher)))
    assert {group["weight_decay"] for group in setup.optimizer.param_groups} == {0}
    setup.schedule.step_update(1)
    first = {group["lr"] for group in setup.optimizer.param_groups}
    assert len(first) == 1
    assert 0.8 * 5e-4 < first.pop() <= 5e-4
    setup.schedule.step_update(setup.steps)
    assert all(group["lr"] < 1e-4 for group in setup.optimizer.param_groups)
    assert not [layer for layer in setup.model.modules() if getattr(layer, "drop_prob", 0.0)]
    assert not [layer for layer in setup.model.modules() if isinstance(layer, nn.Dropout) and layer.p]
    config = setup.config.options()
    assert (config["smoothing"], config["ema"]) == (0, None)


def test_without_a_teacher_the_labels_teach() -> None:
    setup = prepare(recipes.binaryvit(**QUICK))
    assert setup.teacher is None
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    targets = torch.eye(10)[[3, 1, 4, 1]]
    found = setup.objective(lambda images: images, logits, targets)["loss"]
    torch.testing.assert_close(found, -logits.log_softmax(1)[range(4), [3, 1, 4, 1]].mean())


def test_a_run_learns_bits_and_is_loaded_with_them(finished: engine.Result) -> None:
    lines = [json.loads(line) for line in (finished.folder / Run.METRICS).read_text().splitlines()]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    model = smallvit.load(finished.folder)
    assert binary_layers(model) == 4 * 7 + 1 + 3  # blocks, the one with fewer keys, mergings
    steps = [layer.log_step.exp().item() for layer in model.modules() if isinstance(layer, BinaryAttending)]
    assert all(step != pytest.approx(0.005, abs=1e-7) for step in steps)
    assert any(layer.move.any() for layer in model.modules() if getattr(layer, "move", None) is not None)


@pytest.mark.parametrize("calls", [2, 8])
def test_resuming_gives_the_same_bytes(
    finished: engine.Result,
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


def test_runs_are_judged_and_reported(finished: engine.Result, tmp_path: Path, smallvit: Callable[..., tuple]) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    code, out, err = smallvit("eval", folder)
    assert code == 0, err
    metrics = json.loads((folder / "eval" / "test" / "metrics.json").read_text())
    assert metrics["top1"] == pytest.approx(finished.summary["test_top1"], abs=0.6)
    code, out, err = smallvit("report", folder)
    assert code == 0, err
    assert "binaryvit_tiny" in (folder / "report.html").read_text()


def test_a_trained_vit_can_get_bits_and_be_trained_further(teacher: Path, tmp_path: Path) -> None:
    options = {"init": str(teacher), "out": str(tmp_path / "after")}
    after = engine.train(Config.build(binary=True, **QUICK | {"epochs": 1}, **options)).load()
    anew = models.create_model("vit", img_size=8, num_classes=10, in_chans=1, binary=True)
    assert binary_layers(after) == binary_layers(anew) == 6 * 5
    assert list(after.state_dict()) == list(anew.state_dict())


def test_bits_keep_the_weights_that_they_are_added_to(teacher: Path) -> None:
    setup = prepare(Config.build(init=str(teacher), binary=True, **QUICK))
    plain, state = smallvit.load(teacher).state_dict(), setup.model.state_dict()
    assert plain.keys() < state.keys()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert any("binary added" in note for note in setup.notes)
    assert not setup.model.blocks[0].attn.qkv.move.any()


def test_half_the_bits_can_be_added(teacher: Path) -> None:
    setup = prepare(Config.build(init=str(teacher), binary=True, binary_attention=False, **QUICK))
    assert binary_layers(setup.model) == 6 * 4


# Rows and options


def test_the_ablation_goes_from_a_binary_deit_to_binaryvit() -> None:
    found = [row.options for row in rows.ablation(rows.parse("binaryvit_tiny"))]
    parts = ("gap_head", "pool_branches", "residual_affine", "pyramid")
    assert found[:5] == [
        dict.fromkeys(parts, False),
        dict.fromkeys(parts[1:], False),
        dict.fromkeys(parts[2:], False),
        {"pyramid": False},
        {},
    ]
    assert found[5] == {"binary_downsampling": False}
    assert found[6] == dict.fromkeys(("binary_weights", "binary_activations", "binary_attention"), False)
    assert len(found) == 7


def test_rows_of_the_ablation_keep_their_own_options_and_can_be_written_again() -> None:
    made = rows.ablation(rows.parse("binaryvit_tiny,lr=0.001,recipe=binaryvit"))
    assert all(row.options["lr"] == 0.001 and row.recipe == "binaryvit" for row in made)
    assert [rows.parse(row.label) for row in made] == made
    assert len({row.folder(0) for row in made}) == 7
    for row in made:
        Config.build(**row.given({}, None))


@pytest.mark.parametrize("option", ["pyramid=false", "gap_head=false", "binary_weights=false"])
def test_an_ablation_of_what_is_set_already_is_refused(option: str) -> None:
    with pytest.raises(InputError, match="--ablation sets"):
        rows.ablation(rows.parse(f"binaryvit_tiny,{option}"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--no-binary-weights",), "--no-binary-weights is of no use without --binary"),
        (("--no-binary-downsampling",), "is of no use without --binary"),
        (
            ("--binary", "--no-binary-weights", "--no-binary-activations", "--no-binary-attention"),
            "--binary: nothing would have one bit",
        ),
        (("--no-pyramid",), "--no-pyramid: --arch vit96 is no BinaryViT"),
        (("--arch", "vit", "--no-gap-head"), "--no-gap-head: --arch vit96"),
        (("--arch", "swin", "--binary"), "its maps have no binary form"),
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
def test_options_that_make_no_sense_are_told_in_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, smallvit: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = smallvit("train", *arguments, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 2
    assert told in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_full_precision_by_options_is_a_run_without_bits() -> None:
    off = dict.fromkeys(("binary_weights", "binary_activations", "binary_attention"), False)
    setup = prepare(recipes.binaryvit(**QUICK, **off))
    assert binary_layers(setup.model) == 0
