"""Optimisers, schedules, accumulation and the moving average, against their definitions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler

import smallvit
from smallvit import Config, InputError, checkpoint, engine, keeper, objectives
from smallvit.opening import open_run
from smallvit.optim import create_average, create_optimizer, create_schedule
from smallvit.progress import TrainingProgress
from smallvit.runs import Run

STATEFUL = ["adamw", "lamb", "lion", "muon", "sgd", "nadamw", "adan", "adopt", "lambw", "madgradw"]
"""Optimisers that keep their state in different ways: tensors, numbers, in their groups."""


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return smallvit.create_model("vit", img_size=8, num_classes=3, in_chans=1, spt=True, lsa=True, drop_path=0.0)


def options(**given: object) -> smallvit.config.OptimConfig:
    return Config.build(**{"weight_decay": 0.05, "lr": 1e-3} | given).optim


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images, labels = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3
    optimizer.zero_grad()
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("opt", STATEFUL)
def test_every_optimiser_goes_on_to_the_last_bit(opt: str, tmp_path: Path) -> None:
    config = options(opt=opt, ema=0.9)
    whole = model()
    optimizer, average = create_optimizer(whole, config), create_average(whole, config)
    for number in range(3):
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
    found = []
    for number in range(1, steps + 1):
        schedule.step_update(number)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules_follow_their_formulas() -> None:
    rising = [number / 10 for number in range(1, 11)]
    plain = {"warmup": 0.1, "min_lr": 0.1}
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
    assert rates("step", steps, warmup=warmup) == pytest.approx(expected)


@pytest.mark.parametrize("sched", ["cosine", "linear", "step", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (2, 0.5), (3, 0.0), (7, 0.9)])
def test_short_schedules_have_usable_rates(sched: str, steps: int, warmup: float) -> None:
    assert all(0 <= rate <= 1 for rate in rates(sched, steps, warmup=warmup, min_lr=1e-6))


def test_the_rate_scales_with_the_batch() -> None:
    optimizer = create_optimizer(model(), options(lr=1e-3, lr_batch=512, batch_size=128))
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-4}


def test_the_rate_never_rises_to_its_least_where_the_peak_is_lower() -> None:
    config = options(lr=4e-3, lr_batch=2048, batch_size=4, min_lr=1e-5, warmup=0.1)
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
def test_an_unknown_optimiser_is_refused_in_one_line(opt: str) -> None:
    with pytest.raises(InputError, match="no such optimiser") as refused:
        create_optimizer(model(), options(opt=opt))
    assert "\n" not in str(refused.value)


def test_an_optimiser_whose_state_no_checkpoint_can_hold_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="--opt kron: cannot be used here"):
        create_optimizer(model(), options(opt="kron"))


def test_binary_cross_entropy_counts_every_label_of_a_mixed_image_as_whole() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    targets = torch.tensor([[0.9, 0.1, 0.0]])
    loss = objectives.supervised(lambda _: logits, torch.zeros(1), targets, smoothing=0.0, loss="bce")["loss"]
    p = torch.sigmoid(logits)[0].double()
    expected = -(p[0].log() + p[1].log() + (1 - p[2]).log()) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_average_is_the_recurrence_with_its_decay_warmed_up() -> None:
    net, config = model(), options(ema=0.5)
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
    "plugin_init": "exact",
    "aug": "paper",
    "repeats": 3,
    "accumulate": 3,
    "ema": 0.95,
    "dropout": 0.1,
    "opt": "lamb",
    "sched": "wsd",
    "epochs": 3,
    "batch_size": 256,
}


def train(folder: Path, **given: object) -> engine.Result:
    return engine.train(Config.build(**RICH | {"out": str(folder)} | given))


def test_a_run_with_everything_on_resumes_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole")

    def stop(_: TrainingProgress, figures: dict) -> None:
        if figures["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "EPOCH_SECONDS", 0)
        patch.setattr(TrainingProgress, "epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    resumed = engine.train(Config.build(resume=str(tmp_path / "cut")))
    for name in (Run.LAST, Run.BEST):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert resumed.summary["test_loss"] == whole.summary["test_loss"]


def test_the_average_is_what_is_judged_and_saved(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=2, ema=0.99, accumulate=1)
    state, _ = checkpoint.load_weights(result.folder / Run.STATE)
    last, metadata = checkpoint.load_weights(result.folder / Run.LAST)
    assert all(torch.equal(last[name], state[f"average.{name}"]) for name in last)
    assert not torch.equal(last["head.weight"], state["model.head.weight"])
    lines = (result.folder / Run.METRICS).read_text()
    assert lines.count("val_top1_raw") == 2
    assert f'"val_top1": {metadata["val_top1"]}' in lines


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    plain = {"aug": "none", "epochs": 1, "drop_path": 0.0, "dropout": 0.0, "amp": "off", "opt": "sgd", "lr": 0.1}
    plain |= {"ema": None, "plugin_init": "paper", "repeats": 1, "batch_size": 200}
    one, parts = (train(tmp_path / str(n), accumulate=n, **plain) for n in (1, 3))
    whole, _ = checkpoint.load_weights(one.folder / Run.LAST)
    split, _ = checkpoint.load_weights(parts.folder / Run.LAST)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)
