"""The README keeps its word: its Python runs, its commands parse, its files exist."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import timm
import torch

from smallvit.cli.options import parse_options
from smallvit.config import Config
from smallvit.runs import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"smallvit train (--.*)", README)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(snippet.replace("epochs=100", "epochs=1"), "README.md", "exec"), namespace)
    assert namespace["model"] is not None


def test_the_fine_tuning_example_learns_and_gives_timms_model_back() -> None:
    torch.manual_seed(0)
    (snippet,) = (snippet for snippet in SNIPPETS if "set_openness" in snippet)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    model = namespace["model"]
    plain = timm.create_model("deit_tiny_patch16_224", **namespace["small"])
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert namespace["loss"].item() < 1  # 2.3 is guessing


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    assert len(COMMANDS) >= 5
    arguments = shlex.split(re.sub(r"[\[\]]", "", command).split("`")[0].replace(" N", " 0"), comments=True)
    if "--help" not in arguments:
        assert Config.build(**parse_options(arguments, "smallvit train", ""))


def test_the_files_of_a_run_are_named_as_they_are() -> None:
    for name in (Run.CONFIG, Run.METRICS, Run.SUMMARY, Run.LAST, Run.BEST, Run.STATE, Run.CURVES):
        assert f"`{name}`" in README


@pytest.mark.parametrize(
    ("name", "experiment", "label"),
    [
        ("ViT", "lee2021/ablation", "vit"),
        ("ViT + LSA", "lee2021/ablation", "vit+lsa"),
        ("ViT + SPT", "lee2021/ablation", "vit+spt"),
        ("ViT + SPT + LSA", "lee2021/ablation", "vit+spt+lsa"),
        ("ViT + SPT + LSA, our recipe `best`", "best/cifar100", "vit+spt+lsa, best"),
        ("ResNet-56", "lee2021/ablation", "resnet56"),
    ],
)
def test_the_table_of_results_follows_from_the_records(name: str, experiment: str, label: str) -> None:
    lines = (ROOT / "results" / f"{experiment}.jsonl").read_text().splitlines()
    runs = [run for run in map(json.loads, lines) if (run["row"], run["budget"]) == (label, 0.005)]
    accuracy = [run["summary"]["test_top1"] for run in runs]
    figures = f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f} %"
    assert len(runs) >= 2
    assert f"| {name} | {runs[0]['summary']['parameters']:,} | {figures} |" in README


def test_the_accuracies_beside_the_picture_of_attention_follow_from_the_records() -> None:
    plain, both = (json.loads(line) for line in (ROOT / "results" / "tiny20.jsonl").read_text().splitlines())
    assert [(run["config"]["spt"], run["config"]["lsa"]) for run in (plain, both)] == [(False, False), (True, True)]
    told = "With SPT and LSA {:.2f} % of {:,} test images are right, without {:.2f} %"
    figures = both["summary"]["test_top1"], both["summary"]["test_images"], plain["summary"]["test_top1"]
    assert told.format(*figures) in README
    assert both["summary"]["images_seen"] == plain["summary"]["images_seen"]
