"""What models cost: counts against formulas written by hand, memory against sums, and the files that come out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import smallvit as package
from smallvit import models, speed
from smallvit.cli import main
from smallvit.cli import profile as verb
from smallvit.costs import growth, loglog, memory, profiling
from smallvit.costs.subjects import built, subject
from smallvit.profile import count_macs, count_parameters, macs_by_layer

Command = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")
BOTH = {"spt": True, "lsa": True}
ROWS = ("vit", "vit+spt+lsa", "resnet20")
FLAGS = ("--classes", "7", "--batch-sizes", "1", "4", "--amp", "off", "--device", "cpu")
GROWTH = (16, 24, 32)


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(profiling, "ROUNDS", 2)
    patch.setattr(profiling, "GROWTH_ROUNDS", 2)
    patch.setattr(speed, "SAMPLE_SECONDS", 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows at two sizes, and their growth."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        sizes = ["--img-size", "16", "24", "--growth", *map(str, GROWTH)]
        assert main(["profile", *ROWS, *FLAGS, *sizes, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits: grey, 8 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--lsa", "--epochs", "1", "--batch-size", "512", "--out", str(folder)]) == 0
    return folder


def records(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def create(record: dict[str, str]) -> nn.Module:
    """A row's model at its size, by the library."""
    arch, *plugins = record["model"].split("+")
    return package.create_model(arch, img_size=int(record["img_size"]), num_classes=7, **dict.fromkeys(plugins, True))


# Counts


def test_parameters_and_macs_are_those_of_the_models(profiled: Path) -> None:
    found = records(profiled / "profile.csv")
    assert [(each["model"], each["img_size"]) for each in found] == [
        (row, size) for row in ROWS for size in ("16", "24")
    ]
    for record in found:
        model = create(record)
        assert int(record["parameters"]) == sum(p.numel() for p in model.parameters()) == count_parameters(model)
        assert int(record["macs"]) == count_macs(model, 3, int(record["img_size"]))


def test_a_tiny_vits_macs_are_those_of_a_formula_written_by_hand(profiled: Path) -> None:
    """16 pixels: 64 patches of 2 × 2 and a class token, 96 wide, 6 layers, MLPs of twice the width."""
    n, c, depth = 65, 96, 6
    layer = 4 * n * c * c + 2 * n * n * c + 2 * n * c * 2 * c
    record = records(profiled / "profile.csv")[0]
    assert int(record["macs"]) == 64 * 12 * c + depth * layer + c * 7
    assert int(record["tokens"]) == n


def by_hand(arch: str, size: int) -> int:
    """Attention's multiply-accumulates, arXiv:2103.14030, eq. 1 and 2, patches of 4 (ViT) and 2 pixels (Swin)."""
    if arch == "swin":
        stages = [(2, 96, size // 2), (6, 192, size // 4), (4, 384, size // 8)]
        sides = [(depth, c, -(-side // 4) * 4) for depth, c, side in stages]  # filled up to whole windows
        return sum(depth * (4 * s * s * c * c + 2 * 4 * 4 * s * s * c) for depth, c, s in sides)
    depth, n = (9 if arch == "vit" else 12), (size // 4) ** 2 + (2 if "distilled" in arch else 1)
    return depth * (4 * n * 192**2 + 2 * n**2 * 192)


@pytest.mark.parametrize("plugins", [{}, BOTH], ids=["plain", "patched"])
@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("arch", ["vit", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin"])
def test_attention_computes_what_the_published_formulas_say(arch: str, size: int, plugins: dict[str, bool]) -> None:
    model = package.create_model(arch, img_size=size, num_classes=10, **plugins)
    expected = by_hand(arch, size)
    assert growth.measured(model, macs_by_layer(model, 3, size)) == growth.formula(model, size) == expected


@pytest.mark.parametrize("plugins", [{}, BOTH], ids=["plain", "patched"])
@pytest.mark.parametrize("arch", ["cait", "pit", "t2t", "cait_xxs24_224", "pit_xs_224", "swin_tiny_patch4_window7_224"])
def test_formula_and_layers_agree_in_all_families_that_have_one(arch: str, plugins: dict[str, bool]) -> None:
    for size in (32, 48):
        model = package.create_model(arch, img_size=size, num_classes=10, **plugins)
        assert growth.measured(model, macs_by_layer(model, 3, size)) == growth.formula(model, size) > 0


PYRAMID = [(2, 32, 16, 4), (2, 64, 8, 2), (4, 128, 4, 1), (2, 256, 2, 1)]
"""Depth, width, rows of queries and rows of these for one of keys, at 64 px."""


@pytest.mark.parametrize(
    ("parts", "stages", "prefix"),
    [
        ({}, PYRAMID, 0),
        ({"gap_head": False}, PYRAMID, 1),
        ({"pyramid": False, "gap_head": False}, [(6, 192, 4, 1)], 1),
    ],
    ids=["binaryvit", "class token", "deit"],
)
def test_formula_and_layers_agree_where_keys_are_of_fewer_places(
    parts: dict[str, bool], stages: list[tuple[int, int, int, int]], prefix: int
) -> None:
    model = package.create_model("binaryvit_tiny", img_size=64, num_classes=10, **parts)
    expected = 0
    for stage, (depth, c, side, r) in enumerate(stages, 1):
        tokens = prefix if stage == len(stages) else 0
        n, m = side**2 + tokens, (side // r) ** 2 + tokens
        expected += depth * (2 * n * c * c + (2 if r == 1 else 3) * m * c * c + 2 * n * m * c)
    assert growth.measured(model, macs_by_layer(model, 3, 64)) == growth.formula(model, 64) == expected
    assert growth.scores(model, 64)[0].tokens == stages[0][2] ** 2 + (prefix if len(stages) == 1 else 0)


def test_layers_are_counted_without_a_formula_too_and_nothing_where_nothing_attends() -> None:
    beit, cnn = (
        package.create_model(arch, img_size=32, num_classes=2) for arch in ("beit_base_patch16_224", "resnet20")
    )
    attention = growth.measured(beit, macs_by_layer(beit, 3, 32))
    n, c = 2 * 2 + 1, 768
    assert attention == 12 * (4 * n * c * c + 2 * n * n * c)
    assert growth.formula(beit, 32) is None
    assert growth.measured(cnn, macs_by_layer(cnn, 3, 32)) is None


def test_layers_add_up_to_the_model() -> None:
    model = package.create_model("vit", img_size=16, num_classes=7)
    found = macs_by_layer(model, 3, 16)
    assert found[""] == found["patch_embed"] + found["blocks"] + found["head"] == count_macs(model, 3, 16)
    assert found["blocks"] == sum(found[f"blocks.{index}"] for index in range(6))


# Memory


def test_kept_bytes_of_two_layers_are_their_inputs_and_that_of_what_is_between() -> None:
    """Backward needs the image (both layers' weights want their inputs), what GELU was given, and what it gave."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 200), nn.GELU(), nn.Linear(200, 10))
    assert memory.kept_bytes(net, torch.zeros(5, 3, 4, 4), torch.float32) == 4 * 5 * (48 + 200 + 200)
    assert memory.activation_bytes(net, 3, 4, CPU, torch.float32) == 4 * (48 + 200 + 200)


def test_what_shares_its_memory_is_kept_once() -> None:
    class Square(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            activations = images * self.weight  # keeps the images, and a parameter
            return activations * activations.view(-1, 3, 4, 4)  # one memory, twice

    net = Square()
    net.weight = nn.Parameter(torch.ones(3, 4, 4))
    assert memory.kept_bytes(net, torch.zeros(5, 3, 4, 4), torch.float32) == 2 * 4 * 5 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_those_of_all_that_autograd_holds_on_to(dtype: torch.dtype) -> None:
    model = package.create_model("swin", img_size=32, num_classes=10, **BOTH).train()
    images, held = torch.zeros(2, 3, 32, 32), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
    ):
        output = model(images)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert memory.kept_bytes(model, images, dtype) == sum(size for at, size in sizes.items() if at not in own)
    assert output.requires_grad


def test_the_peak_of_a_step_is_what_is_in_use_when_the_widest_layer_goes_back() -> None:
    """Then there are: the images, GELU's input and output (just read) or its input's gradient, its output's gradient;
    weights, AdamW's two averages, the last layer's gradients."""
    images, wide, classes = torch.zeros(4096, 3, 16, 16), 2000, 10
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, wide), nn.GELU(), nn.Linear(wide, classes))
    weights = 768 * wide + wide + wide * classes + classes
    expected = 4 * (len(images) * (768 + 3 * wide) + 3 * weights + wide * classes)
    peak = memory.step_peak_bytes(net, images, torch.float32)
    assert expected <= peak <= 1.01 * expected


def test_the_peak_of_a_small_batch_is_that_of_weights_gradients_and_the_optimisers_state() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 2000), nn.GELU(), nn.Linear(2000, 10))
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    assert 4 * weights <= memory.step_peak_bytes(net, torch.zeros(1, 3, 16, 16), torch.float32) <= 1.01 * 4 * weights


def test_memory_that_is_not_there_is_refused_and_all_else_goes_on() -> None:
    assert memory.unless_short(CPU, lambda: torch.ones(2**50)) is None
    assert memory.unless_short(CPU, lambda: torch.ones(2).sum().item()) == 2
    with pytest.raises(RuntimeError, match="size"):
        memory.unless_short(CPU, lambda: torch.ones(2) @ torch.ones(3))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux grants memory that it does not have")
def test_no_more_memory_is_taken_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 100 * 2**20

    monkeypatch.setattr(memory.psutil, "virtual_memory", Little)
    assert memory.unless_short(CPU, lambda: torch.ones(10 * 2**18).numel()) == 10 * 2**18
    assert memory.unless_short(CPU, lambda: torch.ones(200 * 2**18)) is None
    assert torch.ones(200 * 2**18).numel() == 200 * 2**18


# What comes out


def test_the_files_say_the_same(profiled: Path) -> None:
    found = json.loads((profiled / "profile.json").read_text())
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in found["rows"]]
    assert records(profiled / "profile.csv") == as_text
    assert len(records(profiled / "growth.csv")) == len(found["growth"]) == len(ROWS) * len(GROWTH)
    assert found["command"].startswith("smallvit profile vit vit+spt+lsa resnet20 --classes 7")
    assert (found["precision"], found["device"], found["step_batch_size"]) == ("fp32", "cpu", 4)
    assert set(found["versions"]) == {"smallvit", "torch", "timm", "python"}
    page = (profiled / "profile.md").read_text()
    for row in found["rows"]:
        line = re.search(rf"^\| {re.escape(row['model'])} \| {row['img_size']} \|.*$", page, re.MULTILINE)[0]
        for shown in (f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}", f"{row['latency_ms']:.2f} ("):
            assert f"| {shown}" in line
        assert row["step_peak_bytes"] > 4 * row["activation_bytes_per_image"] + 12 * row["parameters"]
        assert row["out_of_memory"] is None
        assert min(row[name] for name in ("latency_ms", "images_per_second_1", "images_per_second_4")) > 0
    assert f"Command: {found['command']}" in page
    assert "are those of the formula in 6 of 6 points" in page


def test_memory_in_the_files_is_that_of_the_models(profiled: Path) -> None:
    record = records(profiled / "profile.csv")[3]
    model = create(record)
    assert int(record["activation_bytes_per_image"]) == memory.activation_bytes(model, 3, 24, CPU, torch.float32)
    assert int(record["step_peak_bytes"]) == pytest.approx(
        memory.step_peak_bytes(model, torch.zeros(4, 3, 24, 24), torch.float32), rel=0.01
    )


def test_models_grow_with_the_patches_and_stems_of_the_smallest_size(profiled: Path) -> None:
    found = [row for row in records(profiled / "growth.csv") if row["model"] == "vit"]
    assert [int(row["img_size"]) for row in found] == list(GROWTH)
    assert {row["patch_size"] for row in found} == {"2"}
    assert [int(row["tokens"]) for row in found] == [(size // 2) ** 2 + 1 for size in GROWTH]
    for row in found:
        n = int(row["tokens"])
        assert int(row["attention_macs"]) == int(row["attention_macs_formula"]) == 6 * (4 * n * 96**2 + 2 * n * n * 96)
    spec = subject("resnet18", 7).made_for(32)
    assert count_macs(built(spec, 64), 3, 64) == pytest.approx(4 * count_macs(built(spec, 32), 3, 32), rel=1e-3)


def test_sizes_that_a_model_does_not_take_are_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    monkeypatch.setattr(profiling, "SIZES", (12, 16, 20, 24))
    row = "vit96,patch_size=8"
    code, _, _ = smallvit("profile", row, *FLAGS, "--img-size", 16, "--growth", "--out", "out")
    assert code == 0
    assert [int(each["img_size"]) for each in records(Path("out/growth.csv"))] == [16, 24]
    code, _, err = smallvit("profile", row, *FLAGS, "--img-size", 16, "--growth", 16, 20)
    assert code == 2
    assert (
        err == "smallvit: row vit96,patch-size=8: --img-size 20 is not a multiple of the patch size 8; use 16 or 24\n"
    )


def drawn(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], path: Path) -> Figure:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (figures.append(figure), save(figure, *a, **b)))
    loglog.plot_growth(found, path, "title")
    return figures[0]


def test_the_picture_draws_the_figures(profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(profiled / "growth.png") as picture:
        picture.verify()
    found = json.loads((profiled / "profile.json").read_text())["growth"]
    figure = drawn(monkeypatch, found, tmp_path / "again.png")
    assert len(figure.axes) == 4
    for axes, (name, (_, unit)) in zip(figure.axes, loglog.PANELS.items(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        lines = {line.get_label(): line for line in axes.lines}
        for label in ROWS:
            values = [row[name] for row in found if row["model"] == label]
            if None in values:
                assert (label, name) == ("resnet20", "attention_macs")
                continue
            assert lines[label].get_xdata().tolist() == list(GROWTH)
            assert lines[label].get_ydata() == pytest.approx([value / unit for value in values])
            if name == "attention_macs":
                formula = [row["attention_macs_formula"] / unit for row in found if row["model"] == label]
                assert lines[f"{label}: formula"].get_ydata() == pytest.approx(formula)
                assert (lines[label].get_linestyle(), lines[label].get_marker() != "") == ("None", True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ROWS)


def test_without_attention_there_is_no_panel_for_it(profiled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found = json.loads((profiled / "profile.json").read_text())["growth"]
    figure = drawn(monkeypatch, [row for row in found if row["model"] == "resnet20"], tmp_path / "cnn.png")
    assert len(figure.axes) == len(loglog.PANELS) - 1


def test_a_row_that_needs_more_memory_than_there_is_says_so_and_the_rest_goes_on(smallvit: Command) -> None:
    many = 10**9
    code, out, _ = smallvit("profile", "vit", *FLAGS, "--img-size", 8, "--batch-sizes", 1, many, "--out", "out")
    assert code == 0
    assert "vit at 8 pixels: memory was short for" in out
    assert "no memory" in out
    (record,) = records(Path("out/profile.csv"))
    assert record["out_of_memory"] == f"step_peak_bytes images_per_second_{many}"
    assert record["step_peak_bytes"] == record[f"images_per_second_{many}"] == ""
    assert float(record["images_per_second_1"]) > 0


def test_a_run_is_a_row_at_its_own_size_and_with_its_own_classes_and_channels(run: Path, smallvit: Command) -> None:
    code, out, err = smallvit("profile", run, "vit+lsa", *FLAGS, "--out", "out")
    assert code == 0, err
    assert "vit+lsa" in out
    mine, fresh = records(Path("out/profile.csv"))
    model = package.load(run)
    assert (mine["model"], mine["img_size"], fresh["img_size"]) == (str(run), "8", "32")
    assert int(mine["parameters"]) == count_parameters(model)
    assert int(mine["macs"]) == count_macs(model, 1, 8)
    code, _, _ = smallvit("profile", run, *FLAGS, "--img-size", 12, "--out", "larger")
    assert code == 0
    assert int(records(Path("larger/profile.csv"))[0]["macs"]) == count_macs(package.set_input_size(model, 12), 1, 12)


def test_rows_are_the_plain_and_the_patched_vit_where_none_are_given() -> None:
    assert verb.ROWS == ("vit", "vit+spt+lsa")
    assert verb.parser().parse_args([]).batch_sizes == [1, 16, 128]


def test_what_is_there_is_replaced_only_when_asked(profiled: Path, smallvit: Command) -> None:
    profile = ("profile", "vit", *FLAGS, "--img-size", 8, "--out", "out")
    assert smallvit(*profile, "--growth", 8)[0] == 0
    assert Path("out/growth.png").exists()
    code, _, err = smallvit(*profile)
    assert code == 2
    assert err == "smallvit: out: holds results already; choose another folder by --out, or replace by --overwrite\n"
    assert smallvit(*profile, "--overwrite")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["profile.csv", "profile.json", "profile.md"]


REFUSED = {
    "unknown model": (["vti"], "did you mean 'vit'"),
    "unknown plugin": (["vit+sppt"], "did you mean 'spt'"),
    "plugin that does not fit": (["resnet20+lsa"], "row resnet20+lsa: --arch resnet20: cannot patch"),
    "size": (["vit", "--img-size", "30"], "row vit: --img-size 30 is not a multiple of the patch size 4; use 28 or 32"),
    "size of the second row": (["vit,patch_size=4", "swin,patch_size=8", "--img-size", "20"], "use 16 or 24"),
    "batch size": (["--batch-sizes", "4", "0"], "--batch-sizes 0: expected at least 1"),
    "growth": (["--growth", "0"], "--growth 0: expected at least 1"),
    "classes": (["--classes", "0"], "--classes 0: expected at least 1"),
    "option of training": (["vit,lr=0.1"], "row vit,lr=0.1: lr is no option of a model"),
    "recipe": (["vit,recipe=deit"], "recipe is no option of a model"),
    "twice": (["vit+lsa", "vit+lsa"], "row vit+lsa is there twice"),
    "no run": (["no/such/run"], "no such file or folder"),
    "device": (["--device", "cuda:99"], "this machine has cpu"),
    "overwriting nothing": (["--overwrite"], "--overwrite needs --out DIR"),
    "file": (["--out", "file"], "file: a file, not a folder; choose another folder by --out"),
    "file in between": (["--out", "file/below"], "file is a file, not a folder; choose another folder by --out"),
    "flag": (["--grwth"], "did you mean '--growth'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_measured(
    case: str, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    monkeypatch.setattr(profiling, "Timed", None)
    monkeypatch.setattr(memory, "activation_bytes", None)
    arguments, said = REFUSED[case]
    code, out, err = smallvit("profile", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err


def test_a_name_is_resolved_once_so_that_a_model_stays_itself_at_other_sizes() -> None:
    assert subject("vit", 7).made_for(16)["arch"] == models.TINY
    spec = subject("vit", 7).made_for(32)
    small, large = built(spec, 16), built(spec, 48)
    assert small.embed_dim == large.embed_dim == 192
    assert (small.patch_embed.grid_size, large.patch_embed.grid_size) == ((4, 4), (12, 12))
