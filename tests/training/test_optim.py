"""Optimizers, schedules, accumulation and the moving average, against their definitions."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler

import smallvit
from smallvit import Config, InputError
from smallvit.config.options import OptimConfig
from smallvit.models import checkpoint
from smallvit.runs.run import Run
from smallvit.training import checkpointing
from smallvit.training import train as engine
from smallvit.training.launch import open_run
from smallvit.training.optim import create_average, create_optimizer, create_schedule
from smallvit.utils.terminal import TrainingProgress


def slow_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark values of a parametrized test as slow, except those in `kept`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


STATEFUL = ["adamw", "lamb", "lion", "muon", "nadamuon", "sgd", "nadamw", "adan", "adopt", "lambw", "madgradw"]
"""Optimizers that keep their state in different ways: tensors, numbers, in their groups."""


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return smallvit.create_model(
        "vit", img_size=8, num_classes=3, in_chans=1, plugins={"spt": True, "lsa": True}, drop_path_rate=0.0
    )


def options(**given: object) -> OptimConfig:
    return Config.build(**{"weight_decay": 0.05, "lr": 1e-3} | given).optim


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images, labels = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("opt", slow_except(STATEFUL, "adamw", "muon"))
def test_every_optimizer_resumes_bit_exactly(opt: str, tmp_path: Path) -> None:
    config = options(opt=opt, ema_decay=0.9)
    whole = model()
    optimizer, average = create_optimizer(whole, config), create_average(whole, config)
    try:
        step(whole, optimizer, 0)
    except AttributeError as error:  # of timm 1.0.26's NAdamW and Adopt with torch 2.11
        pytest.skip(f"timm's {opt} does not run with this version of torch: {error}")
    average.update(whole, 1)
    for number in range(1, 3):
        step(whole, optimizer, number)
        average.update(whole, number + 1)
    with open_run(Config.build(out=str(tmp_path / "run"))) as run:
        checkpoint.save_state(run / Run.STATE, checkpoint.gather_state(whole, optimizer, average), {"epoch": 1})
        other = model()
        again, mean = create_optimizer(other, config), create_average(other, config)
        assert checkpoint.load_state(run / Run.STATE, other, again, mean) == {"epoch": 1}
    for number in range(3, 6):
        for net, fitted, smooth in ((whole, optimizer, average), (other, again, mean)):
            step(net, fitted, number)
            smooth.update(net, number + 1)
    for mine, theirs in ((whole, other), (average.module, mean.module)):
        assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))


def rates(sched: str, steps: int = 100, **given: object) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule: Scheduler = create_schedule(optimizer, options(sched=sched, lr=1.0, **given), steps)
    values = []
    for number in range(1, steps + 1):
        schedule.step_update(number)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_schedules_follow_their_formulas() -> None:
    rising = [number / 10 for number in range(1, 11)]
    plain = {"warmup_ratio": 0.1, "min_lr": 0.1}
    assert rates("linear", **plain) == pytest.approx(rising + [0.1 + 0.9 * (1 - i / 90) for i in range(1, 91)])
    assert rates("constant", **plain) == pytest.approx(rising + [1.0] * 90)
    falling = [0.1 * i / 20 + (1 - i / 20) for i in range(1, 21)]
    assert rates("wsd", **plain) == pytest.approx(rising + [1.0] * 70 + falling)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (101, 0.0), (7, 0.3), (64, 0.6)])
def test_the_rate_drops_to_a_tenth_after_half_of_the_steps_and_to_a_hundredth_after_three_quarters(
    steps: int, warmup: float
) -> None:
    expected = []
    for done in range(steps):  # before this step
        rate = 1.0 if 2 * done < steps else 0.1 if 4 * done < 3 * steps else 0.01
        expected.append((done + 1) / round(warmup * steps) if done + 1 < round(warmup * steps) else rate)
    assert rates("step", steps, warmup_ratio=warmup) == pytest.approx(expected)


@pytest.mark.parametrize("sched", ["cosine", "linear", "step", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (2, 0.5), (3, 0.0), (7, 0.9)])
def test_short_schedules_have_usable_rates(sched: str, steps: int, warmup: float) -> None:
    assert all(0 <= rate <= 1 for rate in rates(sched, steps, warmup_ratio=warmup, min_lr=1e-6))


def test_the_rate_scales_with_the_batch() -> None:
    optimizer = create_optimizer(model(), options(lr=1e-3, lr_base_size=512, batch_size=128))
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-4}


def test_the_rate_never_rises_to_its_least_where_the_peak_is_lower() -> None:
    config = options(lr=4e-3, lr_base_size=2048, batch_size=4, min_lr=1e-5, warmup_ratio=0.1)
    optimizer = create_optimizer(model(), config)
    schedule = create_schedule(optimizer, config, 20)
    for number in range(1, 21):
        schedule.step_update(number)
        assert optimizer.param_groups[0]["lr"] <= 4e-3 * 4 / 2048


def test_layers_further_down_have_smaller_rates() -> None:
    net = model()
    config = options(layer_decay=0.5)
    optimizer = create_optimizer(net, config)
    create_schedule(optimizer, config, 10).step_update(5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    scale = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    top = scale["head.weight"]
    depth = len(net.blocks)
    for index in range(depth):
        assert scale[f"blocks.{index}.attn.qkv.weight"] == pytest.approx(top * 0.5 ** (depth - index))
    assert scale["cls_token"] == pytest.approx(top * 0.5 ** (depth + 1))


@pytest.mark.parametrize("opt", ["adamw2", "adamv", ""])
def test_unknown_optimizer_gives_an_error_of_one_line(opt: str) -> None:
    with pytest.raises(InputError, match="no such optimizer") as refused:
        create_optimizer(model(), options(opt=opt))
    assert "\n" not in str(refused.value)


def test_optimizer_with_unsupported_state_gives_an_error_of_one_line() -> None:
    with pytest.raises(InputError, match="--opt kron: cannot be used here"):
        create_optimizer(model(), options(opt="kron"))


def test_the_average_is_the_recurrence_with_its_decay_warmed_up() -> None:
    net, config = model(), options(ema_decay=0.5)
    optimizer, average = create_optimizer(net, config), create_average(net, config)
    expected = copy.deepcopy(net.state_dict())
    for number in range(1, 6):
        step(net, optimizer, number)
        average.update(net, number)
        decay = min(0.5, 1 - (1 + (number - 1)) ** (-2 / 3)) if number > 1 else 0.0
        for name, value in net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])


RICH = {
    "arch": "vit",
    "spt": True,
    "lsa": True,
    "plugin_init": "preserve",
    "aug": "lee2021",
    "aug_repeats": 3,
    "grad_accum_steps": 3,
    "ema_decay": 0.95,
    "dropout": 0.1,
    "opt": "lamb",
    "sched": "wsd",
    "epochs": 3,
    "batch_size": 256,
}
FEW = {"train_fraction": 0.1, "batch_size": 64}


def train(folder: Path, **given: object) -> engine.TrainResult:
    return engine.train(Config.build(**RICH | {"out": str(folder), "keep_resume": True} | given))


@pytest.mark.slow
def test_a_run_with_everything_on_resumes_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", **FEW)

    def stop(_: TrainingProgress, figures: dict) -> None:
        if figures["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "EPOCH_SECONDS", 0)
        patch.setattr(TrainingProgress, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", **FEW)
    resumed = engine.train(Config.build(resume=str(tmp_path / "cut")))
    for name in (Run.LAST, Run.BEST):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert resumed.summary["test_loss"] == whole.summary["test_loss"]


def test_moving_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=2, ema_decay=0.99, grad_accum_steps=1, **FEW)
    state, _ = checkpoint.load_weights(result.folder / Run.STATE)
    last, metadata = checkpoint.load_weights(result.folder / Run.LAST)
    assert all(torch.equal(last[name], state[f"average.{name}"]) for name in last)
    assert not torch.equal(last["head.weight"], state["model.head.weight"])
    lines = (result.folder / Run.METRICS).read_text()
    assert lines.count("val_top1_raw") == 2
    assert f'"val_top1": {metadata["val_top1"]}' in lines


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    plain = {"aug": "none", "epochs": 1, "drop_path": 0.0, "dropout": 0.0, "amp": "off", "opt": "sgd", "lr": 0.1}
    plain |= {"ema_decay": None, "plugin_init": "paper", "aug_repeats": 1, "train_fraction": 0.1, "batch_size": 43}
    one, parts = (train(tmp_path / str(n), grad_accum_steps=n, **plain) for n in (1, 3))
    whole, _ = checkpoint.load_weights(one.folder / Run.LAST)
    split, _ = checkpoint.load_weights(parts.folder / Run.LAST)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)
