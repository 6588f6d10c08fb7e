"""Training, from the configuration to the run folder, and what interruptions do to it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import smallvit
from smallvit import Config, InputError, TrainingError, datasets
from smallvit.datasets.loader import evaluation_batches
from smallvit.evaluation.evaluate import evaluate
from smallvit.models import checkpoint
from smallvit.runs import curves
from smallvit.runs.run import Run, best_epoch
from smallvit.training import checkpointing, setup
from smallvit.training import train as engine
from smallvit.training.launch import open_run
from smallvit.training.optim import create_optimizer, create_schedule, plugin_strength
from smallvit.utils import hardware
from smallvit.utils.terminal import TrainingProgress


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


TINY = {"arch": "vit", "spt": True, "lsa": True, "aug": "mix", "epochs": 3, "batch_size": 32, "train_fraction": 0.1}
TINY |= {"lr": 1e-3}
"""129 images of digits, in five batches of 26; the best epoch is the last."""
WHOLE = {"train_fraction": 1.0, "batch_size": 256}


def train(out: Path, **options: object) -> engine.TrainResult:
    return engine.train(Config.build(**TINY | {"out": str(out), "keep_resume": True} | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> engine.TrainResult:
    """Train without interruption."""
    return train(tmp_path_factory.mktemp("runs") / "finished")


def weights(folder: Path) -> tuple[bytes, bytes]:
    return (folder / Run.LAST).read_bytes(), (folder / Run.BEST).read_bytes()


def test_a_run_folder_holds_all_documented_files(finished: engine.TrainResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "curves.png", "summary.json"),
        *("last.safetensors", "best.safetensors", "resume.safetensors"),
    }
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary == finished.summary
    promised = "test_top1 val_top1 train_seconds images_per_second parameters macs peak_memory_bytes hardware versions"
    assert set(promised.split()) <= set(summary)
    assert summary["images_seen"] == 3 * 5 * 26  # epochs, steps, of 129 images
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert summary["val_top1"] == max(line["val_top1"] for line in lines)
    assert (finished.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_hold_the_learned_temperatures_of_every_epoch(finished: engine.TrainResult) -> None:
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    tensors, _ = checkpoint.load_weights(finished.folder / Run.LAST)
    saved = {name.removesuffix(".temperature"): t for name, t in tensors.items() if name.endswith(".temperature")}
    assert len(saved) == 6
    assert lines[-1]["temperatures"] == {name: tensor.tolist() for name, tensor in saved.items()}
    first = lines[0]["temperatures"]
    assert any(first[name] != lines[-1]["temperatures"][name] for name in saved)


def test_the_loaded_model_reproduces_the_reported_test_accuracy(finished: engine.TrainResult) -> None:
    model = smallvit.load_model(finished.folder)
    assert not model.training
    assert len(smallvit.describe(model).changes) == 7
    data = datasets.create_dataset(Config().data)
    device = torch.device("cpu")
    correct = count = 0
    with torch.inference_mode(), hardware.autocast(device, hardware.pick_dtype(device, "auto")):
        for images, labels in evaluation_batches(data, "test", device, 128):
            correct += (model(images).argmax(1) == labels).sum().item()
            count += len(labels)
    assert 100 * correct / count == pytest.approx(finished.summary["test_top1"], abs=0.6)  # path of attention differs


def test_training_again_gives_the_same_bytes(finished: engine.TrainResult, tmp_path: Path) -> None:
    assert weights(train(tmp_path / "again").folder) == weights(finished.folder)


@pytest.mark.slow
def test_another_seed_gives_other_weights(finished: engine.TrainResult, tmp_path: Path) -> None:
    assert weights(train(tmp_path / "other", seed=1).folder) != weights(finished.folder)


def final_lsa_strengths(folder: Path) -> set[float]:
    tensors, _ = checkpoint.load_weights(folder / Run.LAST)
    return {value.item() for name, value in tensors.items() if name.endswith("diagonal_weight")}


@pytest.mark.slow
def test_function_preserving_plugins_fade_self_attention_over_the_given_share_of_steps(tmp_path: Path) -> None:
    exact = {"plugin_init": "preserve", "epochs": 2}
    assert final_lsa_strengths(train(tmp_path / "half", **exact).folder) == {0.0}
    steps = 2 * 5
    (last,) = final_lsa_strengths(train(tmp_path / "whole", **exact, plugin_warmup_ratio=1.0).folder)
    assert last == pytest.approx(1 / steps)
    assert final_lsa_strengths(train(tmp_path / "paper", epochs=1).folder) == set()


def test_plugin_strength_rises_linearly_and_stays_at_one() -> None:
    assert [plugin_strength(step, 8, 0.5) for step in range(1, 9)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [plugin_strength(step, 3, 0.0) for step in range(1, 4)] == [1.0] * 3
    assert [plugin_strength(step, 2, 1.0) for step in range(1, 3)] == [0.0, 0.5]


@pytest.mark.slow
def test_the_ablations_of_the_paper_reach_the_model(tmp_path: Path) -> None:
    options = {"spt_directions": "all", "spt_shift": 0.25, "spt_norm": False, "lsa_temperature": "layer"}
    model = train(tmp_path / "run", epochs=1, lsa_mask=False, **options).load()
    assert model.patch_embed.proj.config == smallvit.SPTConfig(directions="all", shift=0.25, norm=False)
    assert model.blocks[0].attn.temperature.shape == (1,)
    assert not model.blocks[0].attn.masked


@pytest.mark.parametrize("calls", slow_except([1, 3, 6], 3))
def test_resuming_after_an_interrupt_gives_the_same_bytes(
    finished: engine.TrainResult, tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]], calls: int
) -> None:
    """Interrupted in the n-th display of a step or an epoch: in mid-epoch, or between epoch and checkpoint."""
    with interrupted(calls):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / Run.SUMMARY).exists()
    result = engine.train(Config.build(resume=str(tmp_path / "run")))
    assert weights(result.folder) == weights(finished.folder)
    assert result.summary["test_top1"] == finished.summary["test_top1"]
    assert len((tmp_path / "run" / Run.METRICS).read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("written", slow_except([Run.BEST, Run.LAST, Run.METRICS, Run.STATE], Run.METRICS))
def test_a_crash_between_the_files_of_a_checkpoint_loses_nothing(
    finished: engine.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """Break off the second checkpoint before one of its files is renamed to its final name."""
    replace, seen = os.replace, []

    def crash(source: Path, target: Path) -> None:
        seen.append(Path(target).name)
        if seen.count(written) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "EPOCH_SECONDS", 0)
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "run")
    result = engine.train(Config.build(resume=str(tmp_path / "run")))
    assert weights(result.folder) == weights(finished.folder)
    assert not [path for path in result.folder.iterdir() if "partial" in path.name]


KILLED = """
import os
import signal
from smallvit.cli import main
from smallvit.training import checkpointing, train

checkpointing.EPOCH_SECONDS = 0
steps, original = [], train.train_step


def step(*arguments):
    steps.append(1)
    if len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)


train.train_step = step
main({})
"""
"""Train with a checkpoint after each epoch, until the third step of the second one."""


@pytest.mark.slow
def test_kill_9_after_a_checkpoint_loses_nothing(finished: engine.TrainResult, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["train", "--spt", "--lsa", "--aug=mix", "--epochs=3", "--batch-size=32", "--train-fraction=0.1"]
    flags += ["--lr=1e-3", f"--out={out}"]
    killed = subprocess.run([sys.executable, "-c", KILLED.format(flags)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert (out / Run.STATE).exists()
    assert not (out / Run.SUMMARY).exists()
    command = [sys.executable, "-m", "smallvit", "train", "--resume", str(out)]
    assert "resume after epoch" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert weights(out) == weights(finished.folder)


@pytest.mark.slow
def test_a_crash_within_the_first_checkpoint_leaves_a_resumable_run(
    finished: engine.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", full)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path / "run")
    result = engine.train(Config.build(resume=str(tmp_path / "run")))
    assert weights(result.folder) == weights(finished.folder)


def test_two_starts_at_once_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "smallvit.training.launch.os.path.lexists", lambda path: False
    )  # both looked before either made one
    with open_run(Config()) as one, open_run(Config()) as two:
        assert (one.folder.name, two.folder.name) == ("vit-digits", "vit-digits-2")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except([Run.METRICS, Run.LAST], Run.METRICS))
def test_files_that_only_report_are_not_needed_to_resume(
    finished: engine.TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupted_after(2, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / name).unlink()
    result = engine.train(Config.build(resume=str(tmp_path / "run")))
    assert weights(result.folder) == weights(finished.folder)
    assert len((tmp_path / "run" / Run.METRICS).read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [Run.BEST, Run.STATE])
def test_damaged_weights_are_noticed_before_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupted_after(2, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:999])
    monkeypatch.setattr(engine, "train_step", None)  # must not be reached
    with pytest.raises(InputError, match=f"{name}: damaged"):
        engine.train(Config.build(resume=str(tmp_path / "run")))
    assert file.exists()


def interrupted_after(saved: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Train a run that is stopped after this many saved epochs."""

    def stop(_: TrainingProgress, figures: dict) -> None:
        if figures["epoch"] == saved:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "EPOCH_SECONDS", 0)
        patch.setattr(TrainingProgress, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder, **options)


def test_the_best_epoch_follows_the_selected_metric_and_class_weights_cannot_change(
    tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("class,weight\n" + "".join(f"{digit},{1 + digit}\n" for digit in range(10)))
    options = {"class_weights": str(file), "select_by": "macro_f1", "patch_size": 4, "epochs": 2}
    interrupted_after(1, tmp_path / "run", monkeypatch, **options)
    text = file.read_text()
    file.write_text(text.replace("9,10", "9,11"))
    with pytest.raises(InputError, match=r"--class-weights .*: not the class weights that the run was started with"):
        engine.train(Config.build(resume=str(tmp_path / "run")))
    file.rename(tmp_path / "moved.csv").write_text(text)
    result = engine.train(Config.build(resume=str(tmp_path / "run"), class_weights=str(tmp_path / "moved.csv")))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_macro_f1"])
    assert (result.summary["best_epoch"], result.summary["select_by"]) == (best["epoch"], "macro_f1")
    assert result.summary["val_balanced_accuracy"] == best["val_balanced_accuracy"]
    assert 1 <= result.summary["imbalance_ratio"] < 1.5  # means over classes are not printed
    history = [
        {f"val_{name}": value for name, value in zip(("top1", "loss", "macro_f1"), each, strict=True)}
        for each in ((90, 0.5, 40), (80, 0.4, 60), (90, 0.6, 60), (80, 0.4, 50))
    ]
    chosen = [history.index(best_epoch(history, name)) for name in ("top1", "loss", "macro_f1")]
    assert chosen == [0, 1, 1]


def test_a_run_is_locked_while_it_is_open(tmp_path: Path) -> None:
    with open_run(Config.build(out=str(tmp_path / "run"))) as run:
        for options in ({"resume": str(run.folder)}, {"out": str(run.folder), "overwrite": True}):
            with pytest.raises(InputError, match="another process is training there"):
                open_run(Config.build(**options))
        assert (run / Run.CONFIG).exists()
    open_run(Config.build(resume=str(run.folder))).__exit__(None, None, None)


@pytest.mark.slow
def test_a_job_that_is_started_again_waits_for_the_end_of_the_one_before(tmp_path: Path) -> None:
    options = {"out": str(tmp_path / "run"), "auto_resume": True}
    with open_run(Config.build(**options)) as run:
        threading.Timer(0.5, run.unlock).start()
        with open_run(Config.build(**options)) as again:
            assert again.folder == run.folder


def test_batch_norm_with_a_batch_of_one_image_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch norm"):
        train(tmp_path / "run", data=str(image_folder), arch="resnet10t", spt=False, lsa=False, batch_size=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_batch_norm_with_a_micro_batch_of_one_image_is_refused(image_folder: Path, tmp_path: Path) -> None:
    options = WHOLE | {"arch": "resnet10t", "spt": False, "lsa": False, "img_size": 8, "batch_size": 7}
    with pytest.raises(InputError, match="batch norm"):
        train(tmp_path / "run", data=str(image_folder), grad_accum_steps=4, **options)
    train(tmp_path / "run", data=str(image_folder), grad_accum_steps=3, epochs=1, **options)


def test_the_same_command_resumes_though_an_option_is_auto(tmp_path: Path, monkeypatch) -> None:
    options = {"streaming": "auto", "compile": "auto", "auto_resume": True, "epochs": 2}
    interrupted_after(1, tmp_path / "run", monkeypatch, **options)
    with open_run(Config.build(**TINY | options | {"out": str(tmp_path / "run")})) as run:
        assert run.config.data.streaming == "off"


def test_the_weights_of_epochs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path, Config(), new=False)
    for epoch in (10000, 7, 9999):
        run.epoch_file(epoch).touch()
    assert run.epoch_files() == [run.epoch_file(epoch) for epoch in (7, 9999, 10000)]


@pytest.mark.slow
def test_a_new_run_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "evaluate_epoch", lambda *_: (_ for _ in ()).throw(TrainingError("diverged")))
    with pytest.raises(TrainingError, match="diverged"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_shown_and_not_trained_again(finished: engine.TrainResult) -> None:
    before = weights(finished.folder)
    assert engine.train(Config.build(resume=str(finished.folder))).summary == finished.summary
    assert weights(finished.folder) == before


def test_a_run_resumes_on_its_own_images_only(image_folder: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"data": str(image_folder), "img_size": 8, "epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(curves, "plot_curves", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **options)
    (image_folder / "dark" / "000.png").unlink()
    with pytest.raises(InputError, match="not the images that the run was started with"):
        engine.train(Config.build(resume=str(tmp_path / "run")))
    assert (tmp_path / "run" / Run.STATE).exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"epoch \d+, step \d+, at learning rate .*try a lower --lr"):
        train(tmp_path / "run", lr=1e30, amp="off", warmup_ratio=0.0)


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *arguments: object) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(tmp_path / "run", epochs=1, clip_grad=0.5)
    assert max(norms) <= 0.5001


def test_the_model_is_chosen_on_validation_images_and_tested_once(tmp_path: Path, monkeypatch) -> None:
    splits = []
    original = setup.Setup.evaluation_batches
    monkeypatch.setattr(
        setup.Setup, "evaluation_batches", lambda self, split: splits.append(split) or original(self, split)
    )
    train(tmp_path / "run", epochs=2, patch_size=4)
    assert splits == ["val", "val", "test"]


@pytest.mark.slow
def test_without_validation_images_the_last_epoch_is_used(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=2, val_fraction=0, **WHOLE, patch_size=4)
    assert (result.summary["val_top1"], result.summary["best_epoch"]) == (None, 2)
    last, best = weights(result.folder)
    assert last == best
    assert len(datasets.create_dataset(Config.build(val_fraction=0).data).train) == 1438
    assert result.summary["images_seen"] == 2 * 6 * 240  # epochs, steps, of 1,438 images


@pytest.mark.slow
def test_a_run_on_images_from_disk_resumes_to_the_last_bit(image_folder: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"data": str(image_folder), "streaming": "on", "workers": 1, "aug": "deit", "aug_repeats": 2, **WHOLE}
    whole = train(tmp_path / "whole", **options)
    interrupted_after(2, tmp_path / "cut", monkeypatch, **options)
    resumed = engine.train(Config.build(resume=str(tmp_path / "cut"), workers=0))
    assert weights(resumed.folder) == weights(whole.folder)


def test_images_left_out_of_the_test_are_counted(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        shutil.copytree(image_folder, data / split)
    (data / "test" / "dark" / "000.png").write_bytes(b"no image")
    options = {"data": str(data), "streaming": "on", "workers": 0, "epochs": 1, "img_size": 8, **WHOLE}
    with pytest.raises(InputError, match="cannot be decoded"):
        train(tmp_path / "run", **options)
    result = engine.train(Config.build(resume=str(tmp_path / "run"), skip_corrupt=True))  # nothing is lost
    assert result.summary["test_images"] == 59
    assert "test: skipped 1 images" in capsys.readouterr().out


def test_the_mean_over_mirror_images_is_that_of_probabilities(finished: engine.TrainResult) -> None:
    model, data = smallvit.load_model(finished.folder), datasets.create_dataset(Config().data)
    cpu = torch.device("cpu")
    batches = list(evaluation_batches(data, "test", cpu, 100))
    figures = evaluate(model, batches, cpu, torch.float32, flip=True)
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        mean = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    assert figures["loss"] == pytest.approx(torch.nn.functional.nll_loss(mean.log(), labels).item(), rel=1e-5)
    assert figures["top1"] == pytest.approx(100 * (mean.argmax(1) == labels).float().mean().item())


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    config = Config.build(lr=1e-2, min_lr=1e-4, warmup_ratio=0.1, weight_decay=0.05).optim
    model = smallvit.create_model("vit", img_size=8, num_classes=2, in_chans=1)
    optimizer = create_optimizer(model, config)
    schedule = create_schedule(optimizer, config, 100)
    rates = []
    for step in range(100):
        schedule.step_update(step + 1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([1e-3 * step for step in range(1, 11)])
    cosine = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(1, 91)]
    assert rates[10:] == pytest.approx(cosine, rel=1e-4)


def test_weight_decay_spares_vectors_tokens_and_positions() -> None:
    model = smallvit.create_model("vit", img_size=8, num_classes=2, in_chans=1, plugins={"spt": True, "lsa": True})
    optimizer = create_optimizer(model, Config.build(weight_decay=0.05).optim)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"arch": "resnet10t", "spt": False, "lsa": False}, {"img_size": 16}])
def test_other_models_and_sizes_train_on_a_folder(image_folder: Path, tmp_path: Path, options: dict) -> None:
    result = train(tmp_path / "run", data=str(image_folder), **options | WHOLE | {"epochs": 2, "batch_size": 16})
    assert checkpoint.load_model(result.folder).pretrained_cfg["label_names"] == ("dark", "gray", "light")
