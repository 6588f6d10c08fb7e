"""Starting from trained weights: other image sizes, other classes, plugins that come in, parameters that stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

import smallvit as package
from smallvit import Config
from smallvit.models import checkpoint, factory, weights_info
from smallvit.runs.run import Run
from smallvit.training import adapt
from smallvit.training import train as engine
from smallvit.training.launch import inherit_from_init
from smallvit.training.optim import freeze
from smallvit.training.setup import create_setup
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = {"epochs": 1, "batch_size": 128, "train_fraction": 0.3, "aug": "none", "amp": "off"}


def train(folder: Path, **options: Any) -> Path:
    return engine.train(Config.build(**QUICK | {"out": str(folder)} | options)).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on digits: a trained plain ViT, one with plugins, one brought in gradually, and a CNN."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "plain": train(folder / "plain", arch="vit"),
        "patched": train(folder / "patched", arch="vit", spt=True, lsa=True, spt_shift=0.25, lsa_temperature="layer"),
        "exact": train(folder / "exact", arch="vit", lsa=True, plugin_init="preserve"),
        "cnn": train(folder / "cnn", arch="resnet20"),
    }


def begun(init: object, **options: Any) -> nn.Module:
    return create_setup(Config.build(init=str(init), **QUICK | options)).model.eval()


def test_the_model_is_that_of_the_weights_unless_said_otherwise(runs: dict[str, Path]) -> None:
    config = inherit_from_init(Config.build(init=str(runs["patched"])))
    model = config.model
    assert (model.arch, model.spt, model.lsa) == ("vit96", True, True)
    assert (model.spt_shift, model.lsa_temperature) == (0.25, "layer")
    assert (config.data.img_size, model.patch_size) == (8, 2)
    assert inherit_from_init(config) == config
    assert inherit_from_init(Config.build(init=str(runs["patched"]), arch="vit")) == config
    assert inherit_from_init(Config.build(init=str(runs["plain"]), img_size=24)).data.img_size == 24
    assert inherit_from_init(Config.build()).model.arch == "vit"


@pytest.mark.parametrize("name", ["plain", "patched", "exact", "cnn"])
def test_the_initial_model_is_that_of_the_run(runs: dict[str, Path], name: str) -> None:
    model, source = begun(runs[name]), package.load_model(runs[name])
    torch.testing.assert_close(model(X), source(X))


@pytest.mark.slow
def test_a_trained_model_keeps_most_of_its_accuracy_at_another_image_size(tmp_path: Path) -> None:
    """Interpolate the positions of 4×4 tokens to 6×6 tokens."""
    run = train(tmp_path / "run", arch="vit", epochs=10, train_fraction=1.0, batch_size=64, lr=3e-3)
    setup = create_setup(Config.build(init=str(run), img_size=12, **QUICK))
    before = json.loads((run / Run.SUMMARY).read_text())["test_top1"]
    interpolated = setup.evaluate("test")["top1"]
    assert before > 80
    assert interpolated > 0.7 * before
    with torch.no_grad():
        setup.model.pos_embed[:, 1:] = setup.model.pos_embed[:, 1:].mean(dim=1, keepdim=True)
    assert setup.evaluate("test")["top1"] < 0.7 * interpolated


@pytest.mark.parametrize(
    ("arch", "option"),
    [
        ("vit", {}),
        *(
            pytest.param(arch, option, marks=pytest.mark.slow)
            for arch, option in [("cait", {}), ("pit", {}), ("swin", {}), ("t2t", {}), ("vit", {"dist_token": True})]
        ),
    ],
)
def test_position_embeddings_are_interpolated_as_timm_does(tmp_path: Path, arch: str, option: dict[str, Any]) -> None:
    spec = {
        "arch": arch,
        "img_size": 32,
        "in_chans": 1,
        "num_classes": 10,
        "patch_size": factory.default_patch_size(arch, 32),
    }
    torch.manual_seed(1)
    source = factory.create_model(**spec, **option)
    data = {"name": "digits", "class_names": [str(n) for n in range(10)], "mean": [0.5], "std": [0.5]}
    file = tmp_path / "weights.safetensors"
    checkpoint.save_weights(file, checkpoint.snapshot(source), {"model": spec | option, "data": data})
    model = begun(file, img_size=48, train_fraction=0.05)
    ours, theirs = model.state_dict(), source.state_dict()
    changed = {name for name in theirs if ours[name].shape != theirs[name].shape}
    prefix = 2 if option else 1
    if arch in ("vit", "cait"):
        assert changed == {"pos_embed"}
        expected = resample_abs_pos_embed(
            theirs["pos_embed"], [12, 12], [8, 8], num_prefix_tokens=prefix if arch == "vit" else 0
        )
        torch.testing.assert_close(ours["pos_embed"], expected)
    if arch == "pit":
        assert changed == {"pos_embed"}
        grid = theirs["pos_embed"].permute(0, 2, 3, 1).flatten(1, 2)
        expected = resample_abs_pos_embed(grid, [24, 24], [16, 16], num_prefix_tokens=0)
        torch.testing.assert_close(ours["pos_embed"].permute(0, 2, 3, 1).flatten(1, 2), expected)
    if arch == "swin":
        assert changed == {"patch_embed.pos_embed"}
    if arch == "t2t":
        assert not changed
    for name in theirs.keys() - changed:
        torch.testing.assert_close(ours[name], theirs[name])


def test_tables_of_relative_positions_are_resized_as_timm_does() -> None:
    """Between two Swins whose windows differ."""
    torch.manual_seed(0)
    small, large = (
        timm.create_model("swin_tiny_patch4_window7_224", img_size=size, window_size=window, num_classes=3)
        for size, window in ((64, 4), (96, 6))
    )
    tables = {name: value.clone() for name, value in small.state_dict().items() if name.endswith("bias_table")}
    adapt._resize(small, large, 96, weights_info.WeightsInfo(name="weights", option="--init", path=None))
    assert {small.state_dict()[name].shape[0] for name in tables} >= {121}
    for name, table in tables.items():
        shape = large.state_dict()[name].shape
        expected = resize_rel_pos_bias_table(table, large.get_submodule(name.rsplit(".", 1)[0]).window_size, shape)
        torch.testing.assert_close(small.state_dict()[name], expected)
    large.load_state_dict(small.state_dict())


def test_heads_are_new_where_the_classes_are_others(runs: dict[str, Path], image_folder: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "three", data=str(image_folder), arch="vit", img_size=8, train_fraction=1.0)
    spec = json.loads((folder / "config.json").read_text())
    assert spec["arch"] == "vit"
    (image_folder / "light").rename(image_folder / "bright")
    setup = create_setup(Config.build(init=str(folder), data=str(image_folder), **QUICK))
    source = package.load_model(folder)
    assert "new heads" in setup.initial.notes[0]
    assert "images has changed since" in setup.initial.notes[0]
    assert not torch.equal(setup.model.head.weight, source.head.weight)
    torch.testing.assert_close(setup.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    (image_folder / "bright").rename(image_folder / "light")
    kept = create_setup(Config.build(init=str(folder), data=str(image_folder), **QUICK))
    torch.testing.assert_close(kept.model.head.weight, source.head.weight)
    assert "new heads" not in kept.initial.notes[0]
    assert "has changed" not in kept.initial.notes[0]


def test_plugins_added_exactly_change_no_logits(runs: dict[str, Path]) -> None:
    model = begun(runs["plain"], spt=True, lsa=True, plugin_init="preserve")
    torch.testing.assert_close(model(X), package.load_model(runs["plain"])(X), rtol=1e-4, atol=1e-4)
    assert len(package.describe(model).changes) == 7


def test_plugins_may_be_patched_before_or_after_loading(runs: dict[str, Path]) -> None:
    """Patching first and loading the plain weights then, as `load_base_state_dict` does, comes to the same."""
    after = begun(runs["plain"], lsa=True)
    before = factory.create_model("vit", img_size=8, in_chans=1, num_classes=10, plugins={"lsa": True}).eval()
    package.load_base_state_dict(before, package.load_model(runs["plain"]).state_dict())
    torch.testing.assert_close(after(X), before(X))


def test_lsa_strength_is_inherited_from_the_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    config = inherit_from_init(Config.build(init=str(runs["exact"])))
    assert (config.model.plugin_init, config.optim.plugin_warmup_ratio) == ("preserve", 0.0)
    weights, _ = checkpoint.load_weights(train(tmp_path / "run", init=str(runs["exact"])) / Run.LAST)
    assert {value.item() for name, value in weights.items() if name.endswith("diagonal_weight")} == {0.0}


def test_a_distillation_token_can_be_added_to_trained_weights(runs: dict[str, Path]) -> None:
    model = begun(runs["plain"], teacher=str(runs["cnn"]), distill="token")
    source = package.load_model(runs["plain"])
    torch.testing.assert_close(model.head.weight, source.head.weight)
    torch.testing.assert_close(model.pos_embed[:, 2:], source.pos_embed[:, 1:])
    assert model.head_dist.weight.shape == (10, 96)


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_a_plain_state_dict_is_enough_for_the_model_that_is_named(tmp_path: Path, patched: bool) -> None:
    plugins = {"spt": patched, "lsa": patched}
    torch.manual_seed(2)
    source = factory.create_model("vit96", img_size=24, in_chans=1, num_classes=10, patch_size=2, plugins=plugins)
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    model = begun(tmp_path / "bare.safetensors", arch="vit96", img_size=24, patch_size=2, **plugins)
    x = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(model(x), source.eval()(x))


def split_parameters(before: nn.Module, after: nn.Module) -> tuple[set[str], set[str]]:
    ours, theirs = after.state_dict(), before.state_dict()
    same = {name for name in theirs if torch.equal(ours[name], theirs[name])}
    return same, theirs.keys() - same


@pytest.mark.parametrize("name", ["plain", "cnn"])
def test_a_frozen_backbone_stays_and_the_head_learns(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = train(tmp_path / "run", init=str(runs[name]), freeze="backbone", val_fraction=0, lr=1e-2)
    same, changed = split_parameters(package.load_model(runs[name]), package.load_model(folder, "last"))
    heads = {"fc.weight", "fc.bias"} if name == "cnn" else {"head.weight", "head.bias"}
    assert changed == heads
    assert any("running_mean" in each for each in same) == (name == "cnn")
    summary = json.loads((folder / Run.SUMMARY).read_text())
    assert summary["parameters"] == json.loads((runs[name] / Run.SUMMARY).read_text())["parameters"]


def test_patterns_freeze_what_they_name(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = train(tmp_path / "run", init=str(runs["plain"]), freeze="patch_embed.*, blocks.[0-3].*", val_fraction=0)
    same, changed = split_parameters(package.load_model(runs["plain"]), package.load_model(folder, "last"))
    assert {name.split(".")[0] for name in same} == {"patch_embed", "blocks"}
    assert {name.split(".")[1] for name in same if name.startswith("blocks")} == {"0", "1", "2", "3"}
    assert "blocks.4.attn.qkv.weight" in changed


ADDED: dict[str, dict[str, Any]] = {
    "plugins": {"spt": True, "lsa": True},
    "plugins that preserve the function": {"spt": True, "lsa": True, "plugin_init": "preserve"},
    "binary layers": {"binary": True},
    "a distillation token": {"distill": "token", "teacher": "cnn"},
    "nothing": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ADDED)
def test_parameters_that_the_weights_did_not_contain_are_trained_whatever_is_frozen(
    runs: dict[str, Path], what: str
) -> None:
    options = {name: str(runs[value]) if name == "teacher" else value for name, value in ADDED[what].items()}
    init, frozen = str(runs["plain"]), {"backbone": "backbone", "patterns": "cls_token,*.*"}
    weights, _ = checkpoint.load_weights(runs["plain"] / Run.BEST)
    for patterns in frozen.values() if options else ["backbone"]:
        setup = create_setup(Config.build(init=init, freeze=patterns, **QUICK | options | {"warmup_ratio": 0.0}))
        before = {name: value.clone() for name, value in setup.model.state_dict().items()}
        loaded = {name for name, value in weights.items() if name in before and torch.equal(before[name], value)}
        assert loaded
        images, targets = next(setup.batches.epoch(0))
        engine.train_step(setup, 0, 0, images, targets)
        same, changed = set(), set()
        for name, value in setup.model.named_parameters():
            (same if torch.equal(value, before[name]) else changed).add(name)
        unfrozen = {"head.weight", "head.bias"} if patterns == "backbone" else {"pos_embed"}
        assert same == loaded - unfrozen
        assert changed == {name for name, _ in setup.model.named_parameters()} - same
        for norm in (each for each in setup.model.modules() if isinstance(each, nn.BatchNorm1d)):
            assert norm.num_batches_tracked > 0


def test_freezing_only_what_is_new_is_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"--freeze patch_embed\.\*: all of it, or a part, is new to --init"):
        create_setup(Config.build(init=str(runs["plain"]), spt=True, freeze="patch_embed.*", **QUICK))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"img_size": 12, "freeze": "patch_embed.*"}, {"spt": True, "lsa": True, "binary": True, "freeze": "backbone"}],
)
def test_interrupted_fine_tuning_resumes_without_the_initial_weights(
    runs: dict[str, Path],
    tmp_path: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
    options: dict[str, Any],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(runs["plain"], source)
    options = {"init": str(source), "epochs": 3, "train_fraction": 0.1, "batch_size": 43, **options}
    whole = train(tmp_path / "whole", **options)
    with interrupted(5):
        train(tmp_path / "broken", **options)
    shutil.rmtree(source)
    engine.train(Config.build(resume=str(tmp_path / "broken")))
    assert (tmp_path / "broken" / Run.LAST).read_bytes() == (whole / Run.LAST).read_bytes()


@pytest.mark.slow
def test_the_command_of_the_documentation_fine_tunes(smallvit: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ("--epochs", 1, "--train-fraction", 0.3, "--out", out)
    code, shown, err = smallvit("train", "--init", runs["plain"], "--img-size", 12, "--recipe", "finetune", *common)
    assert (code, err) == (0, "")
    assert "from 8 to 12 pixels" in shown
    config = json.loads((out / "config.json").read_text())
    assert (config["arch"], config["layer_decay"], config["img_size"]) == ("vit96", 0.75, 12)
    assert package.load_model(out)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)


@pytest.mark.slow
def test_the_same_command_resumes_after_a_restart(smallvit: Command, runs: dict[str, Path], tmp_path: Path) -> None:
    """Though --init decided otherwise what vit and the recipe's exact plugins are."""
    again = ("--arch", "vit", "--spt", "--recipe", "finetune", "--epochs", 1, "--train-fraction", 0.3, "--auto-resume")
    for _ in range(2):
        code, shown, err = smallvit("train", "--init", runs["patched"], *again, "--out", tmp_path / "run")
        assert (code, err) == (0, "")
    assert "is finished already" in shown


ERRORS: dict[str, tuple[Callable[[dict[str, Path]], list[object]], str]] = {
    "another architecture": (lambda r: ["--init", r["plain"], "--arch", "swin"], "has --arch vit96, not --arch swin"),
    "another patch": (lambda r: ["--init", r["plain"], "--patch-size", 4], "has --patch-size 2, not --patch-size 4"),
    "another shift": (
        lambda r: ["--init", r["patched"], "--spt", "--spt-shift", 0.3],
        "has --spt-shift 0.25, not --spt-shift 0.3",
    ),
    "function-preserving plugins next to published ones": (
        lambda r: ["--init", _only_spt(r), "--lsa", "--plugin-init", "preserve"],
        "has --plugin-init paper, not --plugin-init preserve",
    ),
    "a plugin that it has": (lambda r: ["--init", r["patched"], "--no-spt"], "has --spt, not --no-spt"),
    "no multiple of the patch": (lambda r: ["--init", r["plain"], "--img-size", 17], "17"),
    "freezing nothing": (lambda r: ["--init", r["plain"], "--freeze", "layers.*"], "it consists of patch_embed"),
    "freezing all": (lambda r: ["--init", r["plain"], "--freeze", "*"], "nothing is left to train"),
    "no such thing": (lambda r: ["--init", "deit_tinny_patch16_224"], "did you mean"),
    "plugins on a CNN": (lambda r: ["--init", r["cnn"], "--lsa"], "--arch resnet20"),
}


def _only_spt(runs: dict[str, Path]) -> Path:
    if "spt" not in runs:
        runs["spt"] = train(runs["plain"].parent / "spt", arch="vit", spt=True)
    return runs["spt"]


@pytest.mark.parametrize("case", ERRORS)
def test_contradictions_are_one_line(smallvit: Command, runs: dict[str, Path], tmp_path: Path, case: str) -> None:
    arguments, expected = ERRORS[case]
    out = tmp_path / "run"
    code, _, err = smallvit("train", "--epochs", 1, "--train-fraction", 0.3, "--out", out, *arguments(runs))
    assert (code, err.count("\n")) == (2, 1), err
    assert expected in err
    assert not out.exists()


def test_weights_for_color_images_refuse_gray_images(smallvit: Command, tmp_path: Path) -> None:
    source = factory.create_model("vit", img_size=16, in_chans=3, num_classes=10)
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    code, _, err = smallvit(
        "train", "--init", tmp_path / "bare.safetensors", "--img-size", 16, "--epochs", 1, "--out", tmp_path / "run"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "patch_embed.proj.weight has shape" in err


def test_head_names_are_those_of_the_classifiers() -> None:
    model = factory.create_model("vit", img_size=16, num_classes=3, dist_token=True)
    assert factory.classifier_parameter_names(model) == {
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    }
    with pytest.raises(InputError, match="nothing is left"):
        freeze(model, ("*",))


def test_weights_of_another_model_are_refused_naming_a_tensor(tmp_path: Path) -> None:
    other: dict[str, Tensor] = factory.create_model("cait", img_size=16, in_chans=1, num_classes=10).state_dict()
    save_file({name: value.contiguous() for name, value in other.items()}, tmp_path / "cait.safetensors")
    with pytest.raises(InputError, match=r"not the weights of --arch vit96 \(the model has no blocks"):
        begun(tmp_path / "cait.safetensors", arch="vit", img_size=16)
