"""Test profiles: counts against formulas, memory against sums, time budgets, and output files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import smallvit as package
from smallvit.cli import main
from smallvit.cli import profile as verb
from smallvit.models import factory
from smallvit.profiling import benchmark, flops
from smallvit.profiling import profile as profiling
from smallvit.profiling.flops import count_macs, count_macs_by_layer, count_parameters
from smallvit.profiling.profile import build_model, count_costs, parse_row, plot_growth

Command = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")
BOTH = {"spt": True, "lsa": True}
ROWS = ("vit", "vit+spt+lsa", "resnet20")
FLAGS = ("--classes", "7", "--batch-sizes", "1", "4", "--amp", "off", "--device", "cpu", "--seconds", "1000")
GROWTH = (16, 24)


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(profiling, "ROUNDS", 2)
    patch.setattr(profiling, "GROWTH_ROUNDS", 2)
    patch.setattr(benchmark, "SAMPLE_SECONDS", 1e-3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    monkeypatch.setattr(profiling, "plot_growth", lambda _records, path, _title: path.touch())  # takes half a second


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows at two sizes, and their growth."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        sizes = ["--img-size", "16", "24", "--growth", *map(str, GROWTH)]
        assert main(["profile", *ROWS, *FLAGS, *sizes, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained_run: Path) -> Path:
    """Return a run on the digits: gray, 8 pixels."""
    return trained_run


def records(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def create(record: dict[str, str]) -> nn.Module:
    """Create a row's model at its size."""
    arch, *plugins = record["model"].split("+")
    return package.create_model(
        arch, img_size=int(record["img_size"]), num_classes=7, plugins=dict.fromkeys(plugins, True)
    )


# Counts


def test_counts_equal_those_of_the_models(profiled: Path) -> None:
    result = records(profiled / "profile.csv")
    assert [(each["model"], each["img_size"]) for each in result] == [
        (row, size) for row in ROWS for size in ("16", "24")
    ]
    for record in result:
        model = create(record)
        assert int(record["parameters"]) == sum(p.numel() for p in model.parameters()) == count_parameters(model)
        assert int(record["macs"]) == count_macs(model, 3, int(record["img_size"]))


def test_macs_of_a_tiny_vit_equal_a_formula(profiled: Path) -> None:
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


def test_counted_attention_equals_the_published_formulas() -> None:
    failures = []
    for arch in ("vit", "deit_tiny_distilled_patch16_224", "swin"):
        for size, plugins in ((32, {}), (40, BOTH)):
            model = package.create_model(arch, img_size=size, num_classes=10, plugins=plugins)
            counted = flops.count_attention_macs(model, count_macs_by_layer(model, 3, size))
            if not counted == flops.compute_attention_formula(model) == by_hand(arch, size):
                failures.append((arch, size, plugins, counted))
    assert not failures


def test_attention_without_a_formula_is_counted() -> None:
    beit, cnn = (
        package.create_model(arch, img_size=32, num_classes=2) for arch in ("beit_base_patch16_224", "resnet20")
    )
    attention = flops.count_attention_macs(beit, count_macs_by_layer(beit, 3, 32))
    n, c = 2 * 2 + 1, 768
    assert attention == 12 * (4 * n * c * c + 2 * n * n * c)
    assert flops.compute_attention_formula(beit) is None
    assert flops.count_attention_macs(cnn, count_macs_by_layer(cnn, 3, 32)) is None


@pytest.mark.slow
def test_tokens_are_those_of_the_first_attention_layer() -> None:
    expected = {"vit": 65, "swin": 256, "cait": 64, "pit": 257, "binaryvit_tiny": 256, "resnet20": None}
    tokens = {
        arch: count_costs(package.create_model(arch, img_size=32, num_classes=7), 3, 32)["tokens"] for arch in expected
    }
    assert tokens == expected


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_counted_as_two_products(backend: SDPBackend, masked: bool) -> None:
    """Whichever kernel PyTorch chooses: 2 n m d multiply-accumulates for each head."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(3, 40), nn.Linear(3, 40)

        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(2).mT
            q, kv = self.q(x), self.kv(x[:, :9])
            q, kv = (y.unflatten(-1, (5, 8)).transpose(1, 2) for y in (q, kv))
            mask = torch.zeros(q.shape[-2], kv.shape[-2]) if masked else None
            with sdpa_kernel(backend):
                return nn.functional.scaled_dot_product_attention(q, kv, kv, mask)

    n, m = 16, 9
    assert count_macs(Attend(), 3, 4) == (n + m) * 3 * 40 + 2 * n * m * 40


def test_layers_sum_to_the_model() -> None:
    model = package.create_model("vit", img_size=16, num_classes=7)
    result = count_macs_by_layer(model, 3, 16)
    assert result[""] == result["patch_embed"] + result["blocks"] + result["head"] == count_macs(model, 3, 16)
    assert result["blocks"] == sum(result[f"blocks.{index}"] for index in range(6))


# Memory


def test_kept_bytes_of_two_layers() -> None:
    """Backward needs the image (both layers' weights want their inputs), what GELU was given, and what it gave."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 200), nn.GELU(), nn.Linear(200, 10))
    assert benchmark.kept_bytes(net, torch.zeros(5, 3, 4, 4), torch.float32) == 4 * 5 * (48 + 200 + 200)
    assert benchmark.activation_bytes(net, 3, 4, CPU, torch.float32) == 4 * (48 + 200 + 200)


def test_shared_memory_counts_once() -> None:
    class Square(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            activations = images * self.weight  # keeps the images, and a parameter
            return activations * activations.view(-1, 3, 4, 4)  # one memory, twice

    net = Square()
    net.weight = nn.Parameter(torch.ones(3, 4, 4))
    assert benchmark.kept_bytes(net, torch.zeros(5, 3, 4, 4), torch.float32) == 2 * 4 * 5 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_equal_the_tensors_that_autograd_saves(dtype: torch.dtype) -> None:
    model = package.create_model("swin", img_size=32, num_classes=10, plugins=BOTH).train()
    images, held = torch.zeros(2, 3, 32, 32), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16),
    ):
        output = model(images)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert benchmark.kept_bytes(model, images, dtype) == sum(size for at, size in sizes.items() if at not in own)
    assert output.requires_grad


def test_run_if_memory_allows() -> None:
    assert benchmark.run_if_memory_allows(lambda: torch.ones(2**50)) is None
    assert benchmark.run_if_memory_allows(lambda: torch.ones(2).sum().item()) == 2
    with pytest.raises(RuntimeError, match="size"):
        benchmark.run_if_memory_allows(lambda: torch.ones(2) @ torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_peak_of_a_small_batch_is_weights_gradients_and_optimizer_state() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 2000), nn.GELU(), nn.Linear(2000, 10)).cuda()
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    peak = benchmark.step_peak_bytes(net, torch.zeros(2, 3, 16, 16, device="cuda"), torch.float32)
    assert 4 * weights <= peak <= 1.1 * 4 * weights


# What comes out


def test_output_files_agree(profiled: Path) -> None:
    result = json.loads((profiled / "profile.json").read_text())
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in result["rows"]]
    assert records(profiled / "profile.csv") == as_text
    assert len(records(profiled / "growth.csv")) == len(result["growth"]) == len(ROWS) * len(GROWTH)
    assert result["command"].startswith("smallvit profile vit vit+spt+lsa resnet20 --classes 7")
    assert (result["precision"], result["device"], result["step_batch_size"]) == ("fp32", "cpu", 4)
    assert set(result["versions"]) == {"smallvit", "torch", "timm", "python"}
    page = (profiled / "profile.md").read_text()
    for row in result["rows"]:
        line = re.search(rf"^\| {re.escape(row['model'])} \| {row['img_size']} \|.*$", page, re.MULTILINE)[0]
        for shown in (f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f}", f"{row['latency_ms']:.2f} ("):
            assert f"| {shown}" in line
        assert min(row[name] for name in ("latency_ms", "images_per_second_1", "images_per_second_4")) > 0
    assert f"Command: {result['command']}" in page
    assert "formulas of attention for ViTs and Swins" in page


def test_memory_in_the_files_equals_measurements(profiled: Path) -> None:
    record = records(profiled / "profile.csv")[3]
    model = create(record)
    assert int(record["activation_bytes_per_image"]) == benchmark.activation_bytes(model, 3, 24, CPU, torch.float32)


def test_growth_keeps_patches_and_stems_of_the_smallest_size(profiled: Path) -> None:
    result = [row for row in records(profiled / "growth.csv") if row["model"] == "vit"]
    assert [int(row["img_size"]) for row in result] == list(GROWTH)
    assert {row["patch_size"] for row in result} == {"2"}
    assert [int(row["tokens"]) for row in result] == [(size // 2) ** 2 + 1 for size in GROWTH]
    for row in result:
        n = int(row["tokens"])
        assert int(row["attention_macs"]) == int(row["attention_macs_formula"]) == 6 * (4 * n * 96**2 + 2 * n * n * 96)
    spec = parse_row("resnet18", 7).adapt_spec(32)
    assert count_macs(build_model(spec, 64), 3, 64) == pytest.approx(
        4 * count_macs(build_model(spec, 32), 3, 32), rel=1e-3
    )


def test_unsupported_growth_sizes_are_skipped_unless_requested(
    monkeypatch: pytest.MonkeyPatch, smallvit: Command
) -> None:
    monkeypatch.setattr(profiling, "GROWTH_SIZES", (12, 16, 20, 24))
    row = "vit96,patch_size=8"
    code, _, _ = smallvit("profile", row, *FLAGS, "--img-size", 16, "--growth", "--out", "out")
    assert code == 0
    assert [int(each["img_size"]) for each in records(Path("out/growth.csv"))] == [16, 24]
    code, _, err = smallvit("profile", row, *FLAGS, "--img-size", 16, "--growth", 16, 20)
    assert code == 2
    assert (
        err == "smallvit: row vit96,patch-size=8: --img-size 20 is not a multiple of the patch size 8; use 16 or 24\n"
    )


@pytest.mark.slow
def test_the_figure_plots_the_records(profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(profiled / "growth.png") as picture:
        picture.verify()
    records = json.loads((profiled / "profile.json").read_text())["growth"]
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (figures.append(figure), save(figure, *a, **b)))
    plot_growth(records, tmp_path / "all.png", "title")
    plot_growth([row for row in records if row["model"] == "resnet20"], tmp_path / "cnn.png", "title")
    assert [len(figure.axes) for figure in figures] == [4, 3]  # no panel of attention for a CNN
    for axes, (name, (_, unit)) in zip(figures[0].axes, profiling.PANELS.items(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        lines = {line.get_label(): line for line in axes.lines}
        for label in ROWS:
            values = [row[name] / unit for row in records if row["model"] == label and row[name] is not None]
            assert lines[label].get_ydata() == pytest.approx(values)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(ROWS)


class Clock:
    """A clock that models set forward; `batches` are those that they were given."""

    def __init__(self) -> None:
        self.now, self.batches = 0.0, []

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark, "clock", clock)
    return clock


class Slow(nn.Module):
    """A linear layer that takes so many seconds for each image, by a clock that is not real."""

    def __init__(self, clock: Clock, per_image: float) -> None:
        super().__init__()
        self.clock, self.per_image, self.layer = clock, per_image, nn.Linear(192, 10)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, images: Tensor) -> Tensor:
        self.clock.now += len(images) * self.per_image
        self.clock.batches.append(len(images))
        return self.layer(images.flatten(1))


@pytest.mark.parametrize(("per_image", "batch_size"), [(1e-4, 128), (0.02, 64), (0.05, 16), (0.5, 1), (20.0, 1)])
def test_batch_size_follows_the_time_budget(clock: Clock, per_image: float, batch_size: int) -> None:
    result = benchmark.measure_speed([Slow(clock, per_image)], CPU, "off")
    (figures,) = result.figures
    assert result.batch_size == batch_size == max(clock.batches)
    assert clock.now <= max(benchmark.SECONDS, 20 * per_image)
    assert figures["latency_ms"] == pytest.approx(1e3 * per_image)
    assert figures["inference_images_per_second"] == pytest.approx(1 / per_image)


def test_batch_size_is_that_of_the_slowest_model(clock: Clock) -> None:
    assert benchmark.measure_speed([Slow(clock, 1e-4), Slow(clock, 0.02)], CPU, "off").batch_size == 64
    assert benchmark.measure_speed([Slow(clock, 1e-4), Slow(clock, 0.02)], CPU, "off", seconds=100).batch_size == 128


@pytest.mark.parametrize(
    ("per_image", "seconds", "slow"),
    [
        (1e-3, 10, ""),
        (0.05, 10, "images_per_second_128"),
        (0.05, 1000, ""),
        (1.0, 10, "images_per_second_16 images_per_second_128"),
    ],
)
def test_a_profile_skips_what_exceeds_its_time_budget(
    clock: Clock, smallvit: Command, monkeypatch: pytest.MonkeyPatch, per_image: float, seconds: int, slow: str
) -> None:
    monkeypatch.setattr(profiling, "prepare_for_inference", lambda *_: Slow(clock, per_image).eval())
    flags = ("--classes", 7, "--amp", "off", "--device", "cpu", "--seconds", seconds)
    code, out, err = smallvit("profile", "vit", *flags, "--img-size", 8, "--growth", 8, "--out", "out")
    assert (code, err) == (0, f"measuring vit: up to about {2 * seconds} s (--seconds {seconds})\n")
    (record,) = records(Path("out/profile.csv"))
    assert ("does not fit into --seconds" in out) == bool(slow)
    missing = [name for name in record if name.startswith("images") and not name.endswith("iqr") and not record[name]]
    assert missing == slow.split()
    assert float(record["latency_ms"]) == pytest.approx(1e3 * per_image)
    assert float(records(Path("out/growth.csv"))[0]["ms_per_image"]) == pytest.approx(1e3 * per_image)
    assert clock.now <= 2 * max(seconds, 20 * per_image)


def test_a_run_keeps_its_size_classes_and_channels(run: Path, smallvit: Command) -> None:
    code, out, err = smallvit("profile", run, "vit+lsa", *FLAGS, "--out", "out")
    assert code == 0, err
    assert "vit+lsa" in out
    mine, fresh = records(Path("out/profile.csv"))
    model = package.load_model(run)
    assert (mine["model"], mine["img_size"], fresh["img_size"]) == (str(run), "8", "32")
    assert int(mine["parameters"]) == count_parameters(model)
    assert int(mine["macs"]) == count_macs(model, 1, 8)
    code, _, _ = smallvit("profile", run, *FLAGS, "--img-size", 12, "--out", "larger")
    assert code == 0
    assert int(records(Path("larger/profile.csv"))[0]["macs"]) == count_macs(package.set_input_size(model, 12), 1, 12)


def test_default_rows() -> None:
    assert verb.ROWS == ("vit", "vit+spt+lsa")
    assert verb.parser().parse_args([]).batch_sizes == [1, 16, 128]


def test_results_are_replaced_only_with_overwrite(profiled: Path, smallvit: Command) -> None:
    profile = ("profile", "vit", *FLAGS, "--img-size", 8, "--out", "out")
    assert smallvit(*profile, "--growth", 8)[0] == 0
    assert Path("out/growth.png").exists()
    code, _, err = smallvit(*profile)
    assert code == 2
    assert (
        err
        == "smallvit: out: already holds results; choose another folder with --out, or replace them with --overwrite\n"
    )
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
    "seconds": (["--seconds", "0"], "--seconds 0.0: expected more than 0"),
    "classes": (["--classes", "0"], "--classes 0: expected at least 1"),
    "option of training": (["vit,lr=0.1"], "row vit,lr=0.1: lr is not a model option"),
    "recipe": (["vit,recipe=deit"], "recipe is not a model option"),
    "no run": (["no/such/run"], "no such file or folder"),
    "device": (["--device", "cuda:99"], "this machine has cpu"),
    "file": (["--out", "file"], "file: a file, not a folder; choose another folder with --out"),
    "file in between": (["--out", "file/below"], "file is a file, not a folder; choose another folder with --out"),
    "flag": (["--grwth"], "did you mean '--growth'"),
}


def test_bad_input_exits_with_one_line_before_anything_is_measured(
    smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    monkeypatch.setattr(profiling, "Timing", None)
    monkeypatch.setattr(benchmark, "activation_bytes", None)
    failures = []
    for case, (arguments, message) in REFUSED.items():
        code, out, err = smallvit("profile", *arguments)
        if (code, out) != (2, "") or err.count("\n") != 1 or message not in err:
            failures.append((case, code, err))
    assert not failures


def test_a_model_keeps_its_architecture_at_other_sizes() -> None:
    assert parse_row("vit", 7).adapt_spec(16)["arch"] == factory.TINY
    spec = parse_row("vit", 7).adapt_spec(32)
    small, large = build_model(spec, 16), build_model(spec, 48)
    assert small.embed_dim == large.embed_dim == 192
    assert (small.patch_embed.grid_size, large.patch_embed.grid_size) == ((4, 4), (12, 12))
