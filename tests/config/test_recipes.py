"""Recipes: their published numbers, and runs that start from a recipe or from another run's configuration."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import smallvit as package
from smallvit.cli.parser import options_parser
from smallvit.cli.parser import parse as parse_arguments
from smallvit.config.config import Config, option_types
from smallvit.config.recipes import RECIPES, SMALL_BATCH, apply_recipe
from smallvit.plugins import PLUGINS
from smallvit.runs.run import primary_metric
from smallvit.training.launch import apply_regularization
from smallvit.training.optim import create_optimizer
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]

PUBLISHED = {  # data; passes, batch, learning rate at it, lowest, warm-up in passes, weight decay, augmentation, loss
    # arXiv:2112.13492, its code and its authors' commands: 100 epochs of 3 passes each, 10 of them warm-up
    "lee2021": ("cifar100", 300, 128, 3e-3, 1e-6, 30, 0.05, "lee2021", "ce"),
    # arXiv:2012.12877, table 9; the lowest rate is its code's
    "deit": ("imagenet", 300, 1024, 1e-3, 1e-5, 5, 0.05, "deit", "ce"),
    # arXiv:2204.07118, ViT-S
    "deit3": ("imagenet", 800, 2048, 4e-3, 1e-5, 5, 0.05, "deit3", "bce"),
    # arXiv:2106.10270: 10,000 of 300 * 1,281,167 / 4096 steps
    "augreg": ("imagenet", 300, 4096, 1e-3, 0.0, 10_000 * 4096 / 1_281_167, 0.1, "augreg-medium1", "bce"),
    # arXiv:2104.05704, its code's settings for CIFAR-100
    "cct": ("cifar100", 300, 128, 6e-4, 1e-5, 10, 0.06, "deit", "ce"),
    # arXiv:1512.03385, section 4.2: 64,000 steps of 128 of 45,000 images
    "resnet": ("cifar10", round(64_000 * 128 / 45_000), 128, 0.1, 0.0, 0, 1e-4, "basic", "ce"),
    # arXiv:1605.07146, with a cosine and a warm-up
    "cnn": ("cifar100", 200, 128, 0.1, 0.0, 5, 5e-4, "basic", "ce"),
}
DATA = {"vit": ("digits", "svhn", "cifar100", "tiny-imagenet"), "deit_tiny_patch16_224": ("imagenet",)}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rate(config: Config) -> float:
    """Return the peak learning rate of the warmup."""
    return create_optimizer(nn.Linear(2, 2), apply_regularization(config).optim).param_groups[0]["lr"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_numbers(name: str) -> None:
    data, passes, batch, peak, lowest, warmup, decay, aug, loss = PUBLISHED[name]
    config = RECIPES[name](data=data)
    assert (config.optim.epochs, config.optim.batch_size, config.optim.loss) == (passes, batch, loss)
    assert rate(config) == pytest.approx(peak, rel=1e-9)
    assert config.optim.min_lr == lowest
    assert config.optim.warmup_ratio * passes == pytest.approx(warmup, rel=1e-3)
    assert apply_regularization(config).optim.weight_decay == decay
    assert config.augment.aug == aug
    assert config.optim.ema_decay is None


@pytest.mark.parametrize(
    ("arch", "peak"), [("vit", 3e-3), ("t2t", 3e-3), ("cait", 1e-3), ("pit", 1e-3), ("swin", 1e-3)]
)
@pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn", "tiny-imagenet", "digits"])
def test_the_papers_learning_rate_follows_the_architecture(arch: str, peak: float, data: str) -> None:
    config = RECIPES["lee2021"](arch=arch, data=data)
    assert rate(config) == peak
    assert not config.model.spt
    assert not config.model.lsa


def test_further_published_values() -> None:
    deit3, augreg, cct = (apply_regularization(RECIPES[name]()) for name in ("deit3", "augreg", "cct"))
    assert deit3.optim.opt == "lamb"
    assert (deit3.model.drop_path, deit3.optim.label_smoothing) == (0.05, 0.0)
    assert augreg.optim.clip_grad == 1.0
    assert (augreg.model.dropout, augreg.model.drop_path) == (0.0, 0.0)
    assert (cct.augment.crop, cct.augment.crop_scale, cct.augment.aug_repeats) == ("resized", 0.8, 1)
    assert all(
        apply_regularization(RECIPES[name]()).optim.label_smoothing == 0.1 for name in ("lee2021", "deit", "cct")
    )


def test_recipes_for_cnns_have_further_published_values() -> None:
    resnet, cnn = (RECIPES[name](data="cifar10") for name in ("resnet", "cnn"))
    assert (resnet.model.arch, cnn.model.arch) == ("resnet56", "resnet56")
    assert (resnet.optim.sched, cnn.optim.sched) == ("step", "cosine")
    for config, nesterov in ((resnet, False), (cnn, True)):
        group = create_optimizer(nn.Linear(2, 2), apply_regularization(config).optim).param_groups[0]
        assert (group["momentum"], group["nesterov"]) == (0.9, nesterov)
        assert (apply_regularization(config).optim.label_smoothing, apply_regularization(config).model.drop_path) == (
            0.0,
            0.0,
        )
    deepest = RECIPES["resnet"](arch="resnet110")
    assert deepest.model.arch == "resnet110"
    assert deepest.optim.warmup_ratio * 64_000 == pytest.approx(400)
    large = apply_regularization(RECIPES["cnn"](arch="resnet50", data="imagenet"))  # arXiv:1706.02677, arXiv:1812.01187
    assert (large.optim.epochs, large.optim.batch_size, rate(large), large.optim.weight_decay) == (90, 256, 0.1, 1e-4)
    assert (large.optim.label_smoothing, large.augment.crop, large.optim.warmup_ratio * 90) == (0.1, "resized", 5)


@pytest.mark.parametrize(("name", "peak"), [("deit", 1.25e-4), ("deit3", 2.5e-4), ("augreg", 1e-3)])
def test_batches_are_small_where_the_data_is_not_imagenet(name: str, peak: float) -> None:
    for data in ("cifar100", "path/to/images"):
        config = RECIPES[name](data=data)
        assert config.optim.batch_size == SMALL_BATCH == 128
        assert rate(config) == pytest.approx(peak, rel=1e-9)
    assert RECIPES[name](data="imagenet", batch_size=512).optim.batch_size == 512


@pytest.mark.parametrize("top", ["train", ""])
def test_a_folder_of_imagenet_has_the_batches_of_imagenet(tmp_path: Path, top: str) -> None:
    for number in range(1000):
        assert number % 333 or RECIPES["deit"](data=str(tmp_path)).optim.batch_size == 128
        (tmp_path / top / f"n{number:08}").mkdir(parents=True)
    for name, batch_size in (("deit", 1024), ("deit3", 2048), ("augreg", 4096), ("cnn", 256), ("binaryvit", 512)):
        assert RECIPES[name](data=str(tmp_path)).optim.batch_size == batch_size
        assert RECIPES[name](data=str(tmp_path), batch_size=64).optim.batch_size == 64


@pytest.mark.parametrize(("arch", "data"), [(arch, data) for arch in DATA for data in DATA[arch]])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_configuration_that_json_holds(name: str, arch: str, data: str) -> None:
    config = RECIPES[name](arch=arch, data=data)
    assert (config.model.arch, config.data.data) == (arch, data)
    assert Config.build(**json.loads(json.dumps(config.to_dict()))) == config
    assert Config.build(**apply_recipe(name, {"arch": arch, "data": data})) == config


@pytest.mark.parametrize("name", RECIPES)
def test_given_options_win(name: str) -> None:
    given = {
        "epochs": 7,
        "batch_size": 24,
        "lr": 0.5,
        "aug": "none",
        "seed": 3,
        "opt": "sgd",
        "warmup_ratio": 0.0,
        "spt": False,
    }
    options, config = RECIPES[name](**given).to_dict(), RECIPES[name]()
    assert {option: options[option] for option in given} == given
    assert all(options[option] == config.to_dict()[option] for option in options.keys() - given)
    with pytest.raises(InputError, match="did you mean 'epochs'"):
        RECIPES[name](epoch=3)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_are_and_which_values_are_theirs(name: str) -> None:
    function = name.replace("-", "_")
    recipe = getattr(package.config.recipes, function)
    assert recipe is RECIPES[name]
    assert (recipe.__name__, inspect.signature(recipe).return_annotation) == (function, "Config")
    first, blank, *rest = recipe.__doc__.splitlines()
    assert first.strip()
    assert blank == ""
    command = next(line for line in rest if "Command: smallvit " in line).split(maxsplit=3)[3].split("  ")[0]
    assert (
        Config.build(**parse_arguments(options_parser("smallvit train", ""), command.split())).optim.epochs
        == recipe().optim.epochs
    )
    assert "measured" in recipe.__doc__
    values = apply_recipe(name, {})
    assert set(values) <= set(option_types())
    assert recipe() == Config.build(**values)
    assert {"epochs", "batch_size", "opt", "lr", "sched", "min_lr", "warmup_ratio"} <= set(values)
    assert "aug" in values or not recipe().pretrain.labels


def test_fine_tuning_keeps_what_the_model_computes() -> None:
    finetune = RECIPES["finetune"]
    assert finetune().model.plugin_init == "paper"
    for plugins in ({"spt": True}, {"lsa": True}, {"spt": True, "lsa": True}):
        assert finetune(**plugins).model.plugin_init == "preserve"
    assert finetune(lsa=True, plugin_init="paper").model.plugin_init == "paper"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "lee2021" else pytest.mark.slow) for n in RECIPES])
def test_every_recipe_trains(name: str) -> None:
    result = package.train(RECIPES[name](epochs=1, train_fraction=0.1, batch_size=32, out="run"))
    assert result.summary["epochs"] == 1
    assert 0 < result.summary[f"val_{primary_metric([result.summary])}"] < 100
    stored = json.loads(Path("run/config.json").read_text())
    assert stored["lr"] == RECIPES[name]().optim.lr


def test_fine_tuning_trains_with_plugins() -> None:
    options = {"spt": True, "lsa": True, "epochs": 1, "train_fraction": 0.1, "batch_size": 64, "out": "run"}
    assert package.train(RECIPES["finetune"](**options)).summary["epochs"] == 1


def test_a_run_is_repeated_from_its_folder(smallvit: Command) -> None:
    first = ("train", "--recipe", "deit", "--spt", "--epochs", 2, "--batch-size", 64, "--seed", 5, "--lr", "2e-3")
    assert smallvit(*first, "--train-fraction", 0.1, "--out", "first")[0] == 0
    assert smallvit("train", "--config", "first/config.json")[0] == 0
    assert Path("first/config.json").read_text() == Path("runs/vit-spt-digits/config.json").read_text()
    runs = [metrics(Path(folder)) for folder in ("first", "runs/vit-spt-digits")]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2


def metrics(folder: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in ("train_loss", "val_loss", "val_top1", "lr")) for line in lines]


def parse(*arguments: object) -> dict[str, Any]:
    return parse_arguments(options_parser("smallvit train", ""), [str(argument) for argument in arguments])


def test_flags_win_over_a_recipe() -> None:
    assert parse("--recipe", "deit", "--epochs", 100, "--lr", "1e-3") == apply_recipe(
        "deit", {"epochs": 100, "lr": 1e-3}
    )
    assert parse("--recipe", "lee2021", "--arch", "cait")["lr"] == 1e-3
    assert Config.build(**parse("--recipe", "lee2021", "--lr", "1e-2")) == RECIPES["lee2021"](lr=1e-2)


def test_flags_win_over_a_file_or_a_runs_folder() -> None:
    options = apply_regularization(RECIPES["lee2021"](spt=True, seed=4)).to_dict()
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(options))
    for file in ("run/config.json", "run"):
        assert parse("--config", file) == options
        assert parse("--config", file, "--epochs", 3, "--no-spt") == options | {"epochs": 3, "spt": False}
    Path("mine.json").write_text('{"epochs": 3, "weight_decay": 0.5}')
    assert parse("--config", "mine.json", "--lr", 0.1) == {"epochs": 3, "weight_decay": 0.5, "lr": 0.1}


def test_what_followed_from_a_preset_in_a_run_follows_from_the_one_that_a_flag_names() -> None:
    Path("run").mkdir()
    config = apply_regularization(RECIPES["deit"](drop_path=0.3))
    Path("run/config.json").write_text(json.dumps(config.to_dict()))
    other = apply_regularization(Config.build(**parse("--config", "run", "--regularization", "augreg-0.03")))
    values = (other.model.dropout, other.model.drop_path, other.optim.weight_decay, other.optim.label_smoothing)
    assert values == (0.1, 0.3, 0.03, 0.0)
    assert apply_regularization(Config.build(**parse("--config", "run", "--loss", "bce"))).optim.label_smoothing == 0.0
    assert apply_regularization(Config.build(**parse("--config", "run", "--seed", 0))) == config


BAD = {
    "unknown recipe": (["--recipe", "diet"], "--recipe diet: no such recipe (did you mean 'deit'?)"),
    "both": (["--recipe", "deit", "--config", "good.json"], "not allowed with argument --recipe"),
    "missing": (["--config", "nothing.json"], "nothing.json: No such file or directory"),
    "folder without": (["--config", "."], "config.json: No such file or directory"),
    "long name": (["--config", "x" * 5000], "File name too long"),
    "not JSON": (["--config", "text.json"], "text.json: damaged (not JSON"),
    "binary": (["--config", "binary.json"], "binary.json: damaged (not JSON"),
    "list": (["--config", "list.json"], "list.json: damaged (it holds no options)"),
    "empty": (["--config", "empty.json"], "empty.json: damaged (it holds no options)"),
    "unknown option": (
        ["--config", "unknown.json"],
        "smallvit: unknown option 'epoch' (did you mean",
    ),
    "wrong type": (["--config", "type.json"], "type.json: damaged (--epochs 'many': expected int"),
    "bad flag": (["--recipe", "deit", "--lr", "1e-6"], "--min-lr 1e-05: expected between 0 and --lr 1e-06"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_and_files_are_refused_in_one_line(smallvit: Command, case: str) -> None:
    texts = {"text": "epochs: 3", "list": "[1]", "empty": "{}", "unknown": '{"epoch": 3}', "type": '{"epochs": "many"}'}
    for name, text in (texts | {"good": '{"epochs": 3}'}).items():
        Path(f"{name}.json").write_text(text)
    Path("binary.json").write_bytes(b"\xff\xfe\x00\x80")
    arguments, message = BAD[case]
    code, out, err = smallvit("train", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_recipe_or_file_that_contradicts_a_resumed_run_is_refused(smallvit: Command) -> None:
    config = apply_regularization(RECIPES["lee2021"](epochs=3, batch_size=64))
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(config.to_dict()))
    Path("other.json").write_text('{"batch_size": 128}')
    resume = ("train", "--resume", "run")
    for arguments, message in [
        (("--recipe", "deit"), "--epochs 300: the run in run has 3"),
        (("--recipe", "lee2021", "--epochs", 3), "--batch-size 128: the run in run has 64"),  # 128 is the default too
        (("--config", "other.json"), "--batch-size 128: the run in run has 64"),
    ]:
        code, _, err = smallvit(*resume, *arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err


def test_the_list_names_every_recipe_and_its_values(smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = smallvit("list", "recipes")
    assert code == 0
    lines = {line.split("│")[0].strip(): line for line in out.splitlines()[2:]}
    assert list(lines) == list(RECIPES)
    for name, line in lines.items():
        assert RECIPES[name].__doc__.splitlines()[0] in line
    assert "lr 0.004, lr_base_size 2048" in lines["deit3"]
    assert "batch_size 1024" in lines["deit"]
    assert "did you mean 'recipes'" in smallvit("list", "recipe")[2]


def test_a_recipes_images_can_be_shown(smallvit: Command) -> None:
    assert smallvit("show", "--recipe", "cct", "--out", "sheet.png")[0] == 0
    assert Path("sheet.png").exists()


@pytest.mark.parametrize("arguments", [["list", "recipes"], ["train", "--recipe", "diet"], ["train", "--config", "no"]])
def test_recipes_load_no_torch(arguments: list[str]) -> None:
    check = f"import sys\nfrom smallvit.cli import main\nmain({arguments})\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("options", "plugins"),
    [
        ({}, {"lsa", "stem", "ffn"}),
        ({"arch": "vit96"}, {"lsa", "stem", "ffn"}),
        ({"arch": "vit", "ffn": False}, {"lsa", "stem"}),
        ({"arch": "vit", "spt": True}, {"spt", "lsa"}),
        ({"arch": "vit", "init": "runs/a"}, {"spt", "lsa"}),
        ({"arch": "swin"}, {"spt", "lsa"}),
        ({"arch": "swin", "stem": True}, {"stem", "lsa"}),
    ],
)
def test_best_chooses_plugins_by_architecture(options: dict[str, Any], plugins: set[str]) -> None:
    values = apply_recipe("best", options)
    assert {name for name in PLUGINS if values.get(name)} == plugins


PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def test_the_pages_table_holds_the_values_of_every_recipe() -> None:
    lines = PAGE[PAGE.index("| | `lee2021`") :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    names = head[1:]
    assert names == list(RECIPES)
    table = {option: cells for option, *cells in rows}
    cases = ({"data": "imagenet"}, {}, {"arch": "swin"})
    for column, name in enumerate(names):
        configs = [apply_recipe(name, case) for case in cases]
        options = set().union(*configs) - {"data", "arch"}
        assert options <= set(table)
        for option, cells in table.items():
            values = dict.fromkeys(shown(values[option]) for values in configs if option in values)
            assert cells[column] == " / ".join(values), (name, option)


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "yes" if value is True else str(value)


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=("build", "mine"))
def test_the_pages_snippets_run(snippet: str) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(snippet, "recipes.md", "exec"), namespace)
    assert namespace["config"].model.spt


def test_the_pages_commands_are_understood() -> None:
    Path("runs/vit-digits").mkdir(parents=True)
    for file in ("runs/vit-digits/config.json", "mine.json"):
        Path(file).write_text(json.dumps(Config().to_dict()))
    commands = re.findall(r"^smallvit train (--.*)", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        assert Config.build(**parse(*shlex.split(command, comments=True)))
