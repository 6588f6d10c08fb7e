"""Test the command line: exit codes, one-line errors, interrupts and closed streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import smallvit as package
from smallvit.cli import main
from smallvit.runs.run import Run

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--epochs", 1, "--batch-size", 64, "--train-fraction", 0.05, "--aug", "none")


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_help_and_version(smallvit: Command) -> None:
    assert smallvit("--help")[0] == 0
    assert "train" in smallvit("--help")[1]
    assert smallvit("--version")[:2] == (0, f"smallvit {package.__version__}\n")
    assert smallvit()[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["import smallvit", "import smallvit.runs.run, smallvit.config.config, smallvit.utils.tables"]
)
def test_imports_do_not_load_torch(statement: str) -> None:
    check = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_help_and_invalid_flags_do_not_load_torch() -> None:
    check = (
        "import sys\nfrom smallvit.cli import main\n"
        "for arguments in (['--help'], ['train', '--help'], ['train', '--epochs', '-1'], ['list', '--help']):\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


RICH = """\
import rich.console, smallvit.cli.watch
smallvit.cli.watch.main = lambda argv: rich.console.Console().print("a table")
raise SystemExit(smallvit.cli.main(["watch"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stream"),
    [
        (["-m", "smallvit", "--help"], "stdout"),
        (["-m", "smallvit", "list", "recipes"], "stdout"),
        (["-m", "smallvit", "nonsense"], "stderr"),
        (["-c", RICH], "stdout"),  # rich exits by SystemExit
    ],
)
def test_closed_output_ends_the_program_quietly(arguments: list[str], stream: str) -> None:
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write}
    done = subprocess.run([sys.executable, *arguments], **streams, check=False)
    os.close(write)
    assert done.returncode == 141
    assert not done.stdout
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_behind_standard_output_is_a_one_line_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "smallvit", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "smallvit: standard output: No space left on device\n")


def test_train_help_has_the_common_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    flags = "--arch --spt --lsa --data --aug --epochs --batch-size --lr --img-size --seed --device --out --resume"
    assert all(f"  {flag}" in out for flag in flags.split())


def test_training_twice_creates_two_folders(smallvit: Command) -> None:
    for name in ("vit-spt-digits", "vit-spt-digits-2"):
        code, out, _ = smallvit("train", "--spt", *QUICK)
        assert code == 0
        assert f"weights  runs/{name}/best.safetensors" in out
        assert json.loads(Path(f"runs/{name}/summary.json").read_text())["epochs"] == 1
    code, _, err = smallvit("train", "--epochs", 1, "--out", "runs/vit-spt-digits")
    assert code == 2
    assert "--resume runs/vit-spt-digits continues it, --overwrite replaces it" in err


def test_overwrite_replaces_a_run_after_checking_the_input(smallvit: Command) -> None:
    assert smallvit("train", *QUICK, "--out", "run")[0] == 0
    before = Path("run/best.safetensors").read_bytes()
    assert smallvit("train", *QUICK, "--out", "run", "--overwrite", "--arch", "vti")[0] == 2
    assert Path("run/best.safetensors").read_bytes() == before
    assert smallvit("train", "--resume", "run")[0] == 0
    for made in ("eval/test/metrics.json", "attend/overview.png", "export/model.onnx", "report.html"):
        Path("run", made).parent.mkdir(parents=True, exist_ok=True)
        Path("run", made).write_text("of the weights before")
    assert smallvit("train", *QUICK, "--out", "run", "--overwrite", "--seed", 5)[0] == 0
    left = {path.name for path in Path("run").iterdir()}
    assert not {"eval", "attend", "report.html"} & left
    assert Path("run/export/model.onnx").exists()
    assert json.loads(Path("run/config.json").read_text())["seed"] == 5
    assert Path("run/best.safetensors").read_bytes() != before


def test_resume_keeps_the_options(smallvit: Command) -> None:
    assert smallvit("train", *QUICK, "--seed", 7, "--out", "run")[0] == 0
    for seed in (3, 0):  # 0 is the default, given on purpose all the same
        code, _, err = smallvit("train", "--resume", "run", "--seed", seed)
        assert code == 2
        assert f"--seed {seed}: the run in run has 7" in err
    assert smallvit("train", "--resume", "run", "--epochs", 1, "--data", "digits")[0] == 0


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return arguments and the expected message of each kind of invalid input."""
    return {
        "verb": (["trian"], "did you mean 'train'"),
        "arch": (["train", "--arch", "vti"], "did you mean 'vit'"),
        "data": (["train", "--data", "digts"], "did you mean 'digits'"),
        "flag": (["train", "--ephocs", "3"], "did you mean '--epochs'"),
        "flag value": (["train", "--aug", "bsic"], "did you mean 'basic'"),
        "missing folder": (["train", "--data", str(folder / "missing")], "no such folder"),
        "img size": (["train", "--data", str(folder), "--img-size", "30"], "not a multiple of the patch size 4"),
        "patch": (["train", "--patch-size", "3"], "not a multiple"),
        "epochs": (["train", "--epochs", "-3"], "expected at least 1"),
        "unwritable": (["train", "--out", f"{folder}/dark/000.png/run"], "cannot be written"),
        "out is a file": (["train", "--out", f"{folder}/dark/000.png"], "cannot be written"),
        "out is no run": (["train", "--out", str(folder)], "not empty, and not a run"),
        "split names": (["train", "--data", f"{folder}/dark/000.png/x"], "no such folder"),
        "long name": (["train", "--data", "x" * 5000], "no such data set or folder"),
        "memory": (["train", "--img-size", "30000"], "GiB of memory"),
        "tag": (["train", "--arch", "vit_tiny_patch16_224.nonsense"], "give --init vit_tiny_patch16_224.nonsense"),
        "resume of no run": (["train", "--resume", str(folder)], "not the folder of a run"),
        "resume of nothing": (["train", "--resume", "nothing"], "not the folder of a run"),
        "device": (["train", "--device", "cuda:99"], "this machine has cpu"),
        "device without numbers": (["train", "--device", "meta"], "this machine has cpu"),
        "device name": (["train", "--device", "gpu"], "this machine has cpu"),
        "plugin": (["train", "--arch", "resnet18", "--spt"], "cannot patch this ResNet"),
        "size for the model": (["train", "--arch", "convnext_atto", "--no-fit"], "8-pixel images"),
    }


def test_invalid_input_is_a_one_line_error_and_leaves_no_files(smallvit: Command, image_folder: Path) -> None:
    failures = []
    for name, (arguments, message) in bad_inputs(image_folder).items():
        code, _, err = smallvit(*arguments)
        if code != 2 or message not in err or len(err.splitlines()) != 1 or list(Path().iterdir()):
            failures.append(f"{name}: exit code {code}: {err}")
    assert not failures, "\n".join(failures)
    assert len(list(image_folder.iterdir())) == 3


def test_invalid_input_leaves_existing_folders_unchanged(smallvit: Command) -> None:
    Path("mine").mkdir()
    assert smallvit("train", "--out", "mine/deep/run", "--arch", "vti")[0] == 2
    assert smallvit("train", "--out", "mine", "--arch", "vti")[0] == 2
    assert Path("mine").is_dir()
    assert list(Path("mine").iterdir()) == []


def test_run_can_be_resumed_from_another_folder(
    smallvit: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image_folder.parent)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("smallvit.datasets.decode.decode_image", stop)
        code, _, err = smallvit("train", "--data", "images", "--epochs", 1, "--out", "run")
    assert code == 130
    assert "resume with: smallvit train --resume run" in err
    monkeypatch.chdir(image_folder)
    assert smallvit("train", "--resume", "../run", "--data", ".")[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_dangling_link_is_an_error(smallvit: Command) -> None:
    Path("runs").symlink_to("/nonexistent/disk")
    code, _, err = smallvit("train")
    assert code == 2
    assert "cannot be written" in err


def test_damaged_configuration_is_an_error(smallvit: Command) -> None:
    Path("run").mkdir()
    for damage, line in {
        **dict.fromkeys(("{", "[]", "{}", '{"epochs": "many"}'), "config.json: damaged"),
        '{"unknown": 1}': "written by another version of smallvit: unknown option 'unknown'",
    }.items():
        Path("run", Run.CONFIG).write_text(damage)
        code, _, err = smallvit("train", "--resume", "run")
        assert code == 2, damage
        assert line in err
        assert Path("run", Run.CONFIG).read_text() == damage


def test_divergence_exits_with_one(smallvit: Command) -> None:
    code, _, err = smallvit(
        "train", "--lr", "1e30", "--warmup-ratio", "0", "--amp", "off", "--epochs", 2, "--out", "run"
    )
    assert code == 1
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_while_saving_exits_with_one(smallvit: Command, monkeypatch) -> None:
    def full(*_: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    monkeypatch.setattr("smallvit.models.checkpoint.save_file", full)
    code, _, err = smallvit("train", *QUICK, "--out", "run")
    assert code == 1
    assert "No space left on device" in err
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
def test_interrupt_during_import_of_torch_exits_at_once(tmp_path: Path, delay: float) -> None:
    (tmp_path / "torch.py").write_text(
        "import sys, time\n"
        "print('importing', flush=True)\n"
        "try:\n    time.sleep(1800)\n"
        "except KeyboardInterrupt:\n    print('swallowed', flush=True)\n    time.sleep(1800)\n"
    )
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from smallvit.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), "probe", "resnet18"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == 130
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
