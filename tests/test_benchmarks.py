"""Check the benchmark of a training step: the plain model equals ours, and the table is complete."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import smallvit

PLUGINS = [{"spt": spt, "lsa": lsa} for spt in (False, True) for lsa in (False, True)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("plain", monkeypatch)


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("train_step", monkeypatch)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    return importlib.import_module(name)


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize(("size", "patch"), [(32, 4), (64, 8)])
def test_plain_model_equals_ours(plain: ModuleType, plugins: dict[str, bool], size: int, patch: int) -> None:
    torch.manual_seed(0)
    ours = smallvit.create_model("vit", img_size=size, num_classes=100, drop_path_rate=0.0, plugins=plugins).eval()
    theirs = plain.PlainViT(img_size=size, patch_size=patch, num_classes=100, **plugins).eval()
    theirs.load_state_dict(plain.plain_weights(ours.state_dict()))  # strict: all keys match
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("plugins", [PLUGINS[0], PLUGINS[-1]])
def test_gradients_of_the_plain_model_equal_ours(plain: ModuleType, plugins: dict[str, bool]) -> None:
    torch.manual_seed(0)
    ours = smallvit.create_model("vit", img_size=32, num_classes=100, drop_path_rate=0.0, plugins=plugins)
    theirs = plain.PlainViT(num_classes=100, drop_path=0.0, **plugins)
    theirs.load_state_dict(plain.plain_weights(ours.state_dict()))
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for model in (ours, theirs):
        F.cross_entropy(model(images), labels).backward()
    expected = plain.plain_weights({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_plain_model_fits_a_batch(plain: ModuleType) -> None:
    torch.manual_seed(0)
    model = plain.PlainViT(num_classes=10, depth=2, spt=True, lsa=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_table_is_complete(
    train_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "SQUARES", {"cpu": (256,), "gpu": (256,)})
    train_step.main(["--rounds", "1", "--batch-size", "4", "--no-compile"])
    printed = capsys.readouterr().out
    half = train_step.pick_dtype(train_step.pick_device("auto"), "auto") is torch.bfloat16
    forms = ["plain fp32 eager", "ours fp32 eager", *(["ours bf16 eager"] if half else [])]
    for part in ("model step", "with input"):
        lines = [line for line in printed.splitlines() if f" {part} " in line]
        for plugins in ("none", "SPT + LSA"):
            for form in forms:
                assert sum(f" {plugins} " in line and f" {form}  " in line for line in lines) == 1, (plugins, form)
    assert printed.count("+ EMA") == 2 * (len(forms) - 1)
    assert "compiled" not in printed
    assert "GFLOP/s" in printed
    assert f"torch {torch.__version__}" in printed
    assert "python benchmarks/train_step.py --rounds 1 --batch-size 4 --no-compile" in printed


def test_architectures_without_a_plain_form_are_labeled(train_step: ModuleType) -> None:
    form = train_step.Form(plain=True)
    assert form.name("vit") == "plain fp32 eager"
    assert form.name("cait") == "stand-in: ours fp32, plain AdamW"


def test_fallback_to_eager_is_an_error(train_step: ModuleType) -> None:
    with train_step.cold_cache(), torch._dynamo.config.patch(recompile_limit=1):
        call = torch.compile(torch.sin, backend="eager", dynamic=False)
        call(torch.zeros(3))
        with pytest.raises(Exception, match="limit"):
            call(torch.zeros(4))


def test_shared_cores_settings_differ_in_the_wait_policy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_cores = _module("shared_cores", monkeypatch)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    waits = {name: shared_cores.environment(name) for name in shared_cores.SETTINGS}
    assert "OMP_WAIT_POLICY" not in waits["spinning"]
    assert waits["passive"] == waits["spinning"] | {"OMP_WAIT_POLICY": "passive"}
    assert waits["spincount"] == waits["spinning"] | {"GOMP_SPINCOUNT": "1000"}
    assert {each["OMP_NUM_THREADS"] for each in waits.values()} == {"3"}


@pytest.mark.slow
def test_time_to_accuracy_lengthens_the_schedule_until_the_target_is_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _module("time_to_accuracy", monkeypatch)
    trained: list[float] = []

    def train_ours(given: object, row: str, seed: int, share: float, out: Path) -> object:
        trained.append(share)
        return module.Outcome(top1=100.0 if share >= 0.5 else 0.0, seconds=1.0, images=10)

    monkeypatch.setattr(module, "train_ours", train_ours)
    small = ["--epochs", "1", "--train-fraction", "0.2", "--workers", "0", "--aug", "mix", "--device", "cpu"]
    module.main([*small, "--seeds", "2", "--shares", "0.2", "0.5", "1.0"])
    assert trained == [0.2, 0.5, 0.5]
    assert "times shorter, 2 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did not reach"):
        module.main([*small, "--seeds", "1", "--shares", "0.2"])


def test_the_usual_script_warms_up_and_follows_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module("time_to_accuracy", monkeypatch)
    rates = [module.learning_rate(step, 100) for step in range(100)]
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert max(rates) == pytest.approx(module.LR)
    assert rates[55] == pytest.approx((module.LR + module.MIN_LR) / 2)
    assert rates[-1] < 0.01 * module.LR


def test_launches_are_those_that_pytorch_dispatches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = _module("launches", monkeypatch)
    x, weight = torch.ones(2, 3), torch.ones(3, 3, requires_grad=True)
    with launches.LaunchCounter() as counter:
        (x @ weight.t()).relu().sum().backward()  # views and allocations do not count
    assert counter.counts == {"mm": 2, "relu": 1, "sum": 1, "ones_like": 1, "threshold_backward": 1}
    launches.main(["--rows", "vit96,recipe=quick"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "vit96" in line)
    augmentation, copies, *others, step = (int(cell) for cell in row.split("│")[2:-1])
    assert step == augmentation + sum(others)
    assert copies == 1


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, train_step = _module("gpu", monkeypatch), _module("train_step", monkeypatch)
    monkeypatch.setattr(train_step, "SQUARES", {"cpu": (256,)})
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu, "run_part", lambda command, *_: commands.append(command) or "passed")
    small = ["--device", "cpu", "--batch-size", "2", "--rounds", "1", "--steps", "1", "--minutes", "60"]
    assert gpu.main([*small, "--track", "digits", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    for arch in gpu.LEE2021:
        assert sum(f" {arch} " in line and " eager " in line and "%" in line for line in printed.splitlines()) == 1
    assert "tests: passed" in printed
    assert commands[0][1:3] == ["-m", "pytest"]
    assert commands[1][1:] == ["benchmarks/speedrun/run.py", "digits", "--seeds", "2", "--device", "cpu"]


def test_parts_of_the_gpu_script_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _module("gpu", monkeypatch)
    console = gpu.wide_console()
    for code, expected in (
        ("print('done')", "passed"),
        ("raise SystemExit(3)", "failed (exit code 3)"),
        ("import time; time.sleep(600)", "not finished in time"),
    ):
        limit = gpu.time.monotonic() + (1.0 if "sleep" in code else 600.0)
        assert gpu.run_part([gpu.sys.executable, "-c", code], limit, console) == expected
