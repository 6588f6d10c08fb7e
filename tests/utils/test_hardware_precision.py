"""bf16 where it is right, and nowhere else; fp16 with a scaled loss; TF32."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from smallvit import Config, InputError
from smallvit.evaluation import evaluate
from smallvit.training import optim, train
from smallvit.training.setup import create_setup
from smallvit.utils import hardware
from smallvit.utils import hardware as precision
from smallvit.utils.errors import DivergedError
from smallvit.utils.hardware import LossScaler, choose_dtype, cpu_has_fast_bf16, pick_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_has_fast_bf16", lambda: True)


@pytest.mark.parametrize(("arch", "size", "sound"), [("resnet10t", 16, False), ("resnet10t", 32, True)])
def test_strided_convolutions_of_one_pixel_are_computed_in_fp32(arch: str, size: int, sound: bool) -> None:
    model = timm.create_model(arch, num_classes=3)
    assert choose_dtype(CPU, "auto", model, 3, size) == (torch.bfloat16 if sound else torch.float32)
    assert choose_dtype(CPU, "off", model, 3, size) == torch.float32
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_asking_for_wrong_gradients_is_refused_in_one_line() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    with pytest.raises(InputError, match="--amp bf16: this CPU computes ResNet incorrectly at 16 pixels"):
        choose_dtype(CPU, "bf16", model, 3, 16)
    assert choose_dtype(CPU, "bf16", model, 3, 64) == torch.bfloat16


def test_a_vision_transformer_keeps_its_bf16() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3)
    assert choose_dtype(CPU, "auto", model, 3, 16) == torch.bfloat16


class Functional(nn.Module):
    """A convolution that is no layer, with its kernel put together of two, as SPT does."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        half = self.conv.weight / 2
        return nn.functional.conv2d(x, half + half, self.conv.bias, self.conv.stride, self.conv.padding)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(("chans", "kernel", "stride", "padding"), [(8, 8, 4, 2), (16, 4, 4, 0), (3, 3, 1, 1)])
def test_bf16_is_used_where_its_convolutions_are_right(
    chans: int, kernel: int, stride: int, padding: int, functional: bool
) -> None:
    """Check shapes of which the first two are wrong on CPUs with AMX (PyTorch 2.15), and right on others."""
    conv = nn.Conv2d(chans, 16, kernel, stride, padding)
    images = torch.randn(4, chans, 32, 32).bfloat16()
    with torch.no_grad():
        exact, low = conv(images.float()), conv.bfloat16()(images)
    right = (low - exact).abs().max() < 0.1 * exact.abs().max()
    model = Functional(conv.float()) if functional else conv.float()
    assert choose_dtype(CPU, "auto", model, chans, 32) == (torch.bfloat16 if right else torch.float32)


def test_errors_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "TOLERANCE", 1e-5)  # finer than bf16
    precision._is_correct.cache_clear()
    assert choose_dtype(CPU, "auto", nn.Conv2d(3, 8, 3), 3, 32) == torch.float32
    precision._is_correct.cache_clear()


def test_random_numbers_stay_as_they_are() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    before = torch.get_rng_state()
    choose_dtype(CPU, "auto", model, 3, 48)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("instructions", "seconds", "fast"), [(True, 0.5, True), (True, 1.7, False), (False, 0.5, False)]
)
def test_auto_uses_bf16_on_cpus_that_multiply_faster_with_it(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, seconds: float, fast: bool
) -> None:
    """Check bf16 products that take `seconds` where those of fp32 take 1."""
    now = [0.0]

    def linear(x: Tensor, weight: Tensor) -> None:
        now[0] += seconds if x.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": instructions})
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(nn.functional, "linear", linear)
    assert cpu_has_fast_bf16.__wrapped__() == fast


CUDA, MPS = torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_gpus_without_bf16_take_fp16(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_dtype(CUDA, "auto") == dtype
    chosen = [pick_dtype(CUDA, amp) for amp in (*["bf16"] * native, "fp16", "off")]
    assert chosen == [*[torch.bfloat16] * native, torch.float16, torch.float32]


def test_other_devices_take_half_precision_only_if_asked_for() -> None:
    assert [pick_dtype(MPS, amp) for amp in ("auto", "off")] == [torch.float32] * 2
    assert [pick_dtype(MPS, amp) for amp in ("bf16", "fp16")] == [torch.bfloat16, torch.float16]


def test_fp32_on_cuda_is_tf32_in_the_forward_pass_and_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_tf32", lambda device: True)
    assert hardware.precision_name(CPU, torch.float32) == "tf32"
    for context in (hardware.autocast, hardware.tf32):
        with context(CPU, torch.float32):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "highest"
        with context(CPU, torch.bfloat16):
            assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.undo()
    assert hardware.precision_name(CPU, torch.float32) == "fp32"
    with hardware.autocast(CPU, torch.float32):
        assert torch.get_float32_matmul_precision() == "highest"


OVERFLOW = 2
"""The step, counted from 0, at which a gradient overflows."""


def overflow(model: nn.Module, now: list[int]) -> None:
    """Have a gradient overflow in one step."""
    model.blocks[1].mlp.fc1.weight.register_hook(lambda grad: grad * (math.inf if now[0] == OVERFLOW else 1.0))


def test_fp16_training_skips_steps_that_overflow_as_a_loop_by_hand_does(tmp_path: Path) -> None:
    """Train with accumulation, clipping and a moving average; learning rates are those of a run without overflow."""
    small = {"arch": "vit", "patch_size": 4, "train_fraction": 0.1, "batch_size": 24, "epochs": 1, "aug": "none"}
    options = {"amp": "fp16", "grad_accum_steps": 2, "clip_grad": 0.5, "ema_decay": 0.9, "lr": 3e-3, "drop_path": 0.0}
    setup = create_setup(Config.build(**small, **options, out=str(tmp_path)))
    assert setup.precision == "fp16"
    batches = list(setup.batches.epoch(0))[:5]
    now = [0]

    model = copy.deepcopy(setup.model)
    optimizer, average = (
        optim.create_optimizer(model, setup.config.optim),
        optim.create_average(model, setup.config.optim),
    )
    schedule = optim.create_schedule(optimizer, setup.config.optim, setup.steps)
    overflow(model, now)
    scale, rates = 2.0**16, []
    for step, (images, targets) in enumerate(batches):
        now[0] = step
        schedule.step_update(step + 1)
        optimizer.zero_grad()
        for part, labels in zip(images.tensor_split(2), targets.tensor_split(2), strict=True):
            with torch.autocast("cpu", torch.float16):
                logits = model(part)
            smoothing = setup.config.optim.label_smoothing
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            (loss * (len(part) / len(images)) * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        rates.append(optimizer.param_groups[0]["lr"])
        if all(parameter.grad.isfinite().all() for parameter in model.parameters()):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            average.update(model, step + 1)
        else:
            scale /= 2

    overflow(setup.model, now)
    ours = []
    for step, (images, targets) in enumerate(batches):
        now[0] = step
        before = copy.deepcopy(setup.model.state_dict())
        train.train_step(setup, 0, step, images, targets)
        ours.append(setup.optimizer.param_groups[0]["lr"])
        same = all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())
        assert same == (step == OVERFLOW)
    assert ours == rates
    assert setup.scaler.skipped == 1
    assert setup.scaler.state_dict()["scale"] == scale == 2.0**15
    for mine, other in ((setup.model, model), (setup.average.module, average.module)):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), name


def test_other_precisions_scale_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scaler, loss = LossScaler(CPU, dtype), torch.tensor(2.0)
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.full((2,), math.inf)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        assert scaler.scale(loss) is loss
        scaler.unscale_(optimizer)
        assert scaler.step(optimizer)  # whatever the gradients are
        assert (scaler.is_enabled(), scaler.skipped, scaler.state_dict()) == (False, 0, {})


def test_a_scaler_goes_on_from_its_state_and_ends_where_no_scale_helps() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(scaler: LossScaler, value: float) -> bool:
        weight.grad = None
        scaler.scale((weight * value).sum()).backward()
        return scaler.step(optimizer)

    scaler = LossScaler(CPU, torch.float16)
    assert [step(scaler, value) for value in (1.0, math.inf, 1.0)] == [True, False, True]
    again = LossScaler(CPU, torch.float16)
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()
    assert (again.skipped, again.state_dict()["scale"], again.state_dict()["_growth_tracker"]) == (1, 2.0**15, 1)
    fresh = LossScaler(CPU, torch.float16)
    fresh.load_state_dict({})  # of a run that began in another precision
    assert fresh.state_dict()["scale"] == 2.0**16
    weight.data.fill_(1.0)
    with pytest.raises(DivergedError, match="--amp off"):
        all(not step(again, math.nan) for _ in range(40))
    assert torch.equal(weight, torch.ones(2))


def test_logits_that_overflow_fp16_are_refused() -> None:
    layer = nn.Linear(4, 2)
    nn.init.constant_(layer.weight, 300.0)
    images = torch.full((1, 4), 300.0)
    assert evaluate.compute_logits(layer, images, CPU, torch.float32).isfinite().all()
    with pytest.raises(InputError, match="--amp off"):
        evaluate.compute_logits(layer, images, CPU, torch.float16)


def test_emulated_bf16_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(InputError, match="--amp bf16: this GPU has no bfloat16 and emulates it slowly"):
        pick_dtype(CUDA, "bf16")


def test_tf32_can_be_forbidden_and_the_precision_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for allowed, name, precision_ in ((False, "fp32", "highest"), (True, "tf32", "high")):
        create_setup(Config.build(arch="vit", amp="off", tf32=allowed, device="cpu", out=str(tmp_path)))
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert hardware.precision_name(CUDA, torch.float32) == name
        with hardware.tf32(CUDA, torch.float32):
            assert torch.get_float32_matmul_precision() == precision_
    assert Config.build(tf32=False).to_dict()["tf32"] is False


def test_cudnn_times_its_algorithms_for_cnns_on_gpus_only() -> None:
    convolutional, other = nn.Conv2d(3, 8, 3), nn.Linear(3, 8)
    for model, device, expected in ((convolutional, CUDA, True), (convolutional, CPU, False), (other, CUDA, False)):
        hardware.tune_convolutions(model, device)
        assert torch.backends.cudnn.benchmark == expected
    hardware.tune_convolutions(other, CPU)
