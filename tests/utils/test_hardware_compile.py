"""Test when a model is compiled, and that neither this nor computing activations again changes a result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import smallvit
from smallvit import Config, InputError
from smallvit.runs.run import Run
from smallvit.training import setup as _setup
from smallvit.training import train as engine
from smallvit.training.setup import Setup
from smallvit.utils import hardware
from smallvit.utils.hardware import choose_compilation, is_convolutional

CPU, GPU = torch.device("cpu"), torch.device("cuda")

PLAIN = {"lsa": True, "aug": "mix", "drop_path": 0.0, "train_fraction": 0.1, "lr": 1e-3, "amp": "off"}
"""Without random numbers in the model, which a compiled one draws in another order."""


def train(folder: Path, **more: Any) -> engine.TrainResult:
    return engine.train(Config.build(**PLAIN | {"out": str(folder)} | more))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / Run.METRICS).read_text().splitlines()]
    return [line[name] for line in lines for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize(
    ("device", "macs", "views", "how"),
    [
        # 6 operations · macs · views: 4e14 of them for each of 2 threads on a CPU, 1e16 on a GPU
        (CPU, 10**7, 13_333_333, "off"),
        (CPU, 10**7, 13_333_334, "on"),
        (GPU, 10**9, 1_666_666, "off"),
        (GPU, 10**9, 1_666_667, "on"),
    ],
)
def test_a_run_is_compiled_from_the_work_on_that_pays_for_it(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, macs: int, views: int, how: str
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choose_compilation("auto", device, macs, views) == how


def test_what_is_asked_for_is_done() -> None:
    for work in (1, 10**15):
        assert [choose_compilation(how, GPU, work, work) for how in ("on", "graphs", "off")] == ["on", "graphs", "off"]
        assert [choose_compilation(how, CPU, work, work) for how in ("on", "off")] == ["on", "off"]


def test_graphs_are_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--compile graphs: cpu has no CUDA graphs; give --compile on"):
        train(tmp_path / "run", compile="graphs", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_compiled_stays_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert hardware.compiled(model, "off") is model


def test_is_convolutional_separates_cnns_from_transformers() -> None:
    assert is_convolutional(timm.create_model("resnet18", num_classes=10))
    assert not is_convolutional(timm.create_model("vit_tiny_patch16_224", num_classes=10))
    assert not is_convolutional(
        smallvit.create_model("vit", img_size=32, num_classes=10, plugins={"spt": True, "lsa": True})
    )


class Counting:
    """Counts the graphs that are compiled, and the images that went through them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.graphs = 0
        monkeypatch.setattr(hardware, "compiled", self.compiled)

    def compiled(self, model: torch.nn.Module, how: str) -> torch.nn.Module:
        assert how == "on"
        return torch.compile(model, backend=self.backend)

    def backend(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        self.graphs += 1

        def run(*inputs: torch.Tensor) -> Any:
            self.sizes.append(1)
            return graph.forward(*inputs)

        return run


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
def test_all_training_batches_of_a_run_share_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """129 images, as four batches of 33 an epoch; validation, of other sizes, is not compiled."""
    torch.compiler.reset()
    counting = Counting(monkeypatch)
    train(tmp_path / "run", epochs=2, batch_size=33, grad_accum_steps=parts, compile="on")
    assert counting.graphs == 1
    assert len(counting.sizes) == 2 * 4 * parts


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no compiler")
def test_a_compiled_run_follows_the_eager_one_and_resumes_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    common = {"epochs": 2, "batch_size": 65, "ema_decay": 0.9}
    eager = train(tmp_path / "eager", **common, compile="off").folder
    compiled = train(tmp_path / "compiled", **common, compile="on").folder
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert json.loads((compiled / Run.SUMMARY).read_text())["compile"] == "on"
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-3)
    assert (compiled / Run.LAST).read_bytes() != (eager / Run.LAST).read_bytes()  # it was another computation

    original, steps = engine.train_step, []

    def interrupt(*arguments: Any) -> torch.Tensor:
        loss = original(*arguments)
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", **common, compile="on")
    torch.compiler.reset()  # as in a new process
    resumed = engine.train(Config.build(resume=str(tmp_path / "cut"))).folder
    assert json.loads((resumed / Run.CONFIG).read_text())["compile"] == "on"
    for name in (Run.LAST, Run.BEST):
        assert (resumed / name).read_bytes() == (compiled / name).read_bytes()


def refuse(*_: Any) -> Any:
    raise FileNotFoundError("No such file or directory: 'g++'\nsecond line")


def nop(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
    return graph.forward


@pytest.fixture(params=["forward", pytest.param("backward", marks=pytest.mark.slow)])
def broken_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the forward or the backward pass fails, and auto would compile any run."""
    torch.compiler.reset()
    backend = refuse
    if request.param == "backward":
        from torch._dynamo.backends.common import aot_autograd  # takes seconds to import

        backend = aot_autograd(fw_compiler=nop, bw_compiler=refuse)
    monkeypatch.setattr(hardware, "compiled", lambda model, how: torch.compile(model, backend=backend))
    monkeypatch.setattr(hardware, "MIN_FLOPS", {"cpu": 0, "gpu": 0})


@pytest.mark.slow
@pytest.mark.usefixtures("broken_compiler")
def test_auto_trains_uncompiled_where_compiling_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Use batch norm, whose statistics the failed step must not change."""
    common = {"arch": "resnet20", "lsa": False, "epochs": 1, "batch_size": 65}
    plain = train(tmp_path / "plain", **common, compile="off").folder
    capsys.readouterr()
    fallen_back = train(tmp_path / "auto", **common, compile="auto").folder
    notice = "torch.compile failed (FileNotFoundError: No such file or directory: 'g++')"
    assert capsys.readouterr().out.count(notice) == 1
    for name in (Run.SUMMARY, Run.CONFIG):
        assert json.loads((fallen_back / name).read_text())["compile"] == "off"
    for name in (Run.LAST, Run.BEST):
        assert (fallen_back / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("broken_compiler")
def test_a_teacher_that_cannot_be_compiled_teaches_uncompiled(tmp_path: Path) -> None:
    teacher = train(tmp_path / "teacher", epochs=1, compile="off").folder
    taught = train(tmp_path / "taught", epochs=1, teacher=str(teacher), compile="auto").folder
    assert json.loads((taught / Run.SUMMARY).read_text())["compile"] == "off"


@pytest.mark.slow
@pytest.mark.usefixtures("broken_compiler")
def test_compiling_that_was_requested_and_fails_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--compile on: .*FileNotFoundError: No such file.*; give --compile off"
    ) as error:
        train(tmp_path / "run", epochs=1, compile="on")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("broken_compiler")
@pytest.mark.parametrize("compile", ["auto", "on"])
def test_a_step_that_fails_uncompiled_too_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: str
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("in the step itself")

    monkeypatch.setattr(engine, "backward", fail)
    with pytest.raises(ZeroDivisionError, match="in the step itself"):
        train(tmp_path / "run", epochs=1, compile=compile)


WITHOUT_COMPILER = """
import sys
from smallvit.cli import main
from smallvit.utils import hardware
hardware.MIN_FLOPS = {"cpu": 0, "gpu": 0}
common = ["train", "--epochs", "1", "--train-fraction", "0.1", "--device", "cpu"]
codes = [main([*common, "--compile", how, "--out", f"{sys.argv[1]}/{how}"]) for how in ("on", "auto")]
print("codes", *codes)
"""


@pytest.mark.slow
def test_a_machine_without_a_compiler_trains(tmp_path: Path) -> None:
    """Run in a separate process, since inductor reads CXX when it is imported."""
    hidden = {"CXX": str(tmp_path / "none"), "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, str(tmp_path)],
        env=os.environ | hidden,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "codes 2 0" in done.stdout, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("smallvit: --compile on: this model cannot be compiled here (")
    assert done.stdout.count("not compiled: torch.compile failed (") == 1
    assert not (tmp_path / "on").exists()
    assert json.loads((tmp_path / "auto" / Run.SUMMARY).read_text())["compile"] == "off"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["vit", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("swin", "cait", "t2t"))]
)
def test_activations_that_are_computed_again_are_the_same(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    """Use dropout and stochastic depth, whose random numbers must be those of the first time."""
    calls: list[str] = []
    original = _setup.create_setup

    def create(*arguments: Any, **options: Any) -> Setup:
        setup = original(*arguments, **options)
        for layer in setup.model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(lambda *_: calls.append(arch))
        return setup

    monkeypatch.setattr(engine, "create_setup", create)
    common = {"arch": arch, "data": str(image_folder), "epochs": 1, "batch_size": 24, "dropout": 0.2, "drop_path": 0.2}
    plain = train(tmp_path / "plain", **common).folder
    plainly = len(calls)
    again = train(tmp_path / "again", **common, grad_checkpointing=True).folder
    assert len(calls) - plainly > plainly
    assert losses(again) == pytest.approx(losses(plain), abs=1e-6)


@pytest.mark.parametrize("arch", ["pit", "convit_tiny"])
def test_a_model_that_cannot_compute_them_again_is_refused(image_folder: Path, tmp_path: Path, arch: str) -> None:
    options = {"arch": arch, "lsa": False, "data": str(image_folder), "grad_checkpointing": True}
    with pytest.raises(InputError, match=f"--grad-checkpointing: {arch} does not support it"):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
