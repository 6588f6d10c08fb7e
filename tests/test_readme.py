"""Check that the README's Python runs, its commands parse, and its figures follow from the records."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import timm
import torch

from smallvit.cli.parser import options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config
from smallvit.runs.run import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PATCHING = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "patching.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"smallvit train (--.*)", README)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(snippet.replace("epochs=100", "epochs=1"), "README.md", "exec"), namespace)
    assert namespace["model"] is not None


@pytest.mark.slow
def test_fine_tuning_example_learns_and_restores_timms_model() -> None:
    torch.manual_seed(0)
    (snippet,) = (snippet for snippet in PATCHING if "optimizer.step()" in snippet)
    namespace: dict = {}
    exec(compile(snippet, "patching.md", "exec"), namespace)
    model = namespace["model"]
    plain = timm.create_model("deit_tiny_patch16_224", **namespace["small"])
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert namespace["loss"].item() < 1  # 2.3 is guessing


def test_commands_parse() -> None:
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        arguments = shlex.split(re.sub(r"[\[\]]", "", command).split("`")[0].replace(" N", " 0"), comments=True)
        if "--help" not in arguments:
            assert Config.build(**parse_arguments(options_parser("smallvit train", ""), arguments))


def test_run_files_are_listed() -> None:
    for name in (Run.CONFIG, Run.METRICS, Run.SUMMARY, Run.LAST, Run.BEST, Run.STATE, Run.CURVES):
        assert f"`{name}`" in README


ROWS = {
    "ViT": ("lee2021/ablation", "vit"),
    "ViT + LSA": ("lee2021/ablation", "vit+lsa"),
    "ViT + SPT": ("lee2021/ablation", "vit+spt"),
    "ViT + SPT + LSA": ("lee2021/ablation", "vit+spt+lsa"),
    "ViT + SPT + LSA, recipe `best` with `--spt`": ("best/cifar100", "vit+spt+lsa, best"),
    "ResNet-56": ("lee2021/ablation", "resnet56"),
    "small ViT, recipe `lee2021`": ("plugins/cifar100", "lee2021: plain"),
    "small ViT + SPT + LSA, recipe `lee2021`": ("plugins/cifar100", "lee2021: SPT, LSA"),
    "small ViT, recipe `best` without plugins": ("plugins/cifar100", "best: plain"),
    "small ViT, recipe `best` with `--spt`": ("plugins/cifar100", "best: SPT, LSA"),
    "small ViT, recipe `best`: stem, FFN and LSA": ("plugins/cifar100", "best: stem, LSA, FFN"),
    "the same with `--weight-init mimetic`": ("plugins/cifar100", "best: stem, LSA, FFN, mimetic"),
    "ResNet-32, recipe `cnn`": ("plugins/cifar100", "resnet32"),
}
"""Rows of the tables of results, with the experiment and its row in the records."""
BUDGETS = {"lee2021/ablation": 0.005, "best/cifar100": 0.005, "plugins/cifar100": 0.1}


def test_results_table_follows_from_the_records() -> None:
    for name, (experiment, label) in ROWS.items():
        lines = (ROOT / "results" / f"{experiment}.jsonl").read_text().splitlines()
        runs = [run for run in map(json.loads, lines) if (run["row"], run["budget"]) == (label, BUDGETS[experiment])]
        accuracy = [run["summary"]["test_top1"] for run in runs]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(runs) > 1 else ""
        seeds = f" {len(runs)} |" if experiment == "plugins/cifar100" else ""
        parameters = f"{runs[0]['summary']['parameters']:,}"
        assert f"| {name} | {parameters} | {statistics.mean(accuracy):.2f}{spread} % |{seeds}\n" in README


def test_accuracies_of_the_attention_figure_follow_from_the_records() -> None:
    plain, both = (json.loads(line) for line in (ROOT / "results" / "tiny20.jsonl").read_text().splitlines())
    assert [(run["config"]["spt"], run["config"]["lsa"]) for run in (plain, both)] == [(False, False), (True, True)]
    sentence = "The accuracy is {:.2f} % on {:,} test images with SPT and LSA, and {:.2f} % without"
    figures = both["summary"]["test_top1"], both["summary"]["test_images"], plain["summary"]["test_top1"]
    assert sentence.format(*figures) in " ".join(README.split())
    assert both["summary"]["images_seen"] == plain["summary"]["images_seen"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_demo_installs_no_development_tools_and_trains_briefly(tmp_path: Path) -> None:
    def lines(target: str) -> list[str]:
        command = ["make", "-n", "--no-print-directory", target, f"VENV={tmp_path / 'venv'}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    demo = lines("demo")
    assert any(line.endswith("pip install --editable .") for line in demo)
    assert not any("[dev]" in line for line in demo)
    assert any("[dev]" in line for line in lines("install"))
    verb, *arguments = shlex.split(demo[-1])[1:]
    assert verb == "train"
    config = Config.build(**parse_arguments(options_parser("smallvit train", ""), arguments))
    assert (config.data.data, config.model.spt, config.model.lsa) == ("digits", True, True)
    assert config.optim.epochs * 1294 <= 35_000  # images of the training split: 60 s at 600 images/s
