"""Test operations and bytes of one-bit layers against formulas, and the tables that show them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import smallvit as package
from smallvit.cli import main
from smallvit.plugins.binary import BinaryConfig
from smallvit.plugins.binary_layers import BinaryConv2d, BinaryLinear, signs
from smallvit.plugins.binary_packing import pack
from smallvit.profiling import benchmark, profile
from smallvit.profiling.flops import (
    count_float_bytes,
    count_macs,
    count_macs_by_layer,
    count_operations,
    count_packed_bytes,
)
from smallvit.utils import tables

Command = Callable[..., tuple[int, str, str]]

CLASSES = 7
PATCH = 2
WIDTHS, DEPTHS, RATIOS, SIDES, KEYS = (32, 64, 128, 256), (2, 2, 4, 2), (8, 8, 4, 4), (16, 8, 4, 2), (4, 4, 4, 2)
"""binaryvit_tiny at 32 pixels, stage by stage; sides of the grids of tokens, and of keys."""
NO_BITS = {"weights": False, "activations": False, "attention": False}
FLAGS = ("--classes", CLASSES, "--batch-sizes", 1, "--amp", "off", "--device", "cpu", "--out", "out")


def tiny(**options: Any) -> nn.Module:
    return package.create_model("binaryvit_tiny", img_size=32, num_classes=CLASSES, plugins={"binary": options})


def bops_and_flops(model: nn.Module, img_size: int = 32) -> tuple[int, int]:
    result = count_operations(model, count_macs_by_layer(model, 3, img_size))
    assert result.macs == result.bops + result.flops == count_macs(model, 3, img_size)
    assert result.ops == result.bops / 64 + result.flops
    return result.bops, result.flops


def macs_by_hand() -> dict[str, int]:
    """binaryvit_tiny's multiply-accumulates by kind: what has weights in blocks, attention's products, and so on."""
    kinds = {"weights": 0, "products": 0, "mergings": 0}
    kinds["rest"] = 16 * 16 * 3 * PATCH**2 * WIDTHS[0] + WIDTHS[-1] * CLASSES  # embedding, head
    for stage, (c, depth, ratio) in enumerate(zip(WIDTHS, DEPTHS, RATIOS, strict=True)):
        n, m = SIDES[stage] ** 2, KEYS[stage] ** 2
        fewer = 2 * m + (m if m < n else 0)  # keys, values, and the layer that they pass where there are fewer
        kinds["weights"] += depth * (2 * n + fewer + 2 * ratio * n) * c * c
        kinds["products"] += depth * 2 * n * m * c
        kinds["mergings"] += n * 4 * (c // 2) * c if stage else 0
    return kinds


ONE_BIT = {  # options, and the kinds whose two factors have one bit
    "all": ({}, ("weights", "products", "mergings")),
    "mergings in full precision": ({"downsampling": False}, ("weights", "products")),
    "attention in full precision": ({"attention": False}, ("weights", "mergings")),
    "weights alone": ({"activations": False, "attention": False}, ()),
    "weights and attention": ({"activations": False}, ("products",)),
    "activations alone": ({"weights": False, "attention": False}, ()),
    "activations and attention": ({"weights": False}, ("products",)),
    "attention alone": ({"weights": False, "activations": False}, ("products",)),
    "nothing": (NO_BITS, ()),
}


@pytest.mark.slow
def test_products_of_two_one_bit_factors_are_binary_operations() -> None:
    by_hand, failures = macs_by_hand(), []
    for case, (options, kinds) in ONE_BIT.items():
        bops = sum(by_hand[kind] for kind in kinds)
        if bops_and_flops(tiny(**options)) != (bops, sum(by_hand.values()) - bops):
            failures.append(case)
    assert not failures


@pytest.mark.parametrize(
    ("plugins", "window"),
    [({}, 4), ({"lsa": True}, 4), ({"spt": True, "lsa": True}, 8)],
    ids=["plain", "lsa", "both"],
)
def test_operations_of_a_binary_vit_equal_a_formula(plugins: dict[str, bool], window: int) -> None:
    """32 pixels: 64 patches of 4 × 4 (SPT reads windows of 8 × 8), a class token, 192 wide, 9 layers, MLPs of 384."""
    n, c = 65, 192
    model = package.create_model("vit", img_size=32, num_classes=CLASSES, plugins={"binary": True, **plugins})
    bops = 9 * (4 * n * c * c + 2 * n * n * c + 4 * n * c * c)
    assert bops_and_flops(model) == (bops, 64 * 3 * window**2 * c + c * CLASSES)


def test_full_precision_attention_counts_as_flops() -> None:
    stages = [(2, 96, 16), (6, 192, 8), (4, 384, 4)]  # depth, width, side; windows of 4 × 4, MLPs of twice the width
    model = package.create_model("swin", img_size=32, num_classes=CLASSES, plugins={"binary": {"attention": False}})
    bops = sum(depth * 8 * side**2 * c * c for depth, c, side in stages)
    bops += sum(side**2 * 2 * c * c for _, c, side in stages[1:])  # mergings: 4 · c/2 to c
    products = sum(depth * 2 * 4 * 4 * side**2 * c for depth, c, side in stages)
    assert bops_and_flops(model) == (bops, products + 256 * 12 * 96 + 384 * CLASSES)


def test_counting_leaves_a_model_unchanged() -> None:
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bops_and_flops(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Bytes


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (BinaryLinear, nn.Linear(12, 5)),
        (BinaryLinear, nn.Linear(16, 3, bias=False)),
        (BinaryConv2d, nn.Conv2d(3, 5, kernel_size=3)),
    ],
    ids=["linear", "whole bytes", "convolution"],
)
def test_packed_bytes_of_a_layer_are_bits_and_scales(kind: type, layer: nn.Module) -> None:
    whole = 4 * layer.weight.numel() + 4 * (0 if layer.bias is None else layer.bias.numel())
    assert count_packed_bytes(layer) == count_float_bytes(layer) == whole
    kind.adopt(layer, BinaryConfig())
    sign, scale = signs(layer.weight.detach(), centered=False)
    bits = np.packbits(sign.flatten(1).numpy() > 0, axis=1)
    moved = 4 * layer.weight.shape[1]
    assert count_packed_bytes(layer) - moved == bits.nbytes + scale.numpy().nbytes + whole - 4 * layer.weight.numel()
    assert count_float_bytes(layer) == whole + moved


def linear(inputs: int, outputs: int, *, packed: bool) -> int:
    """Bytes of a linear layer of BinaryViT: weights, its batch norm, RPReLU, and what is added before the sign."""
    weight = outputs * -(-inputs // 8) + 4 * outputs if packed else 4 * inputs * outputs
    return weight + norm(outputs) + 12 * outputs + 4 * inputs


def norm(c: int) -> int:
    """Bytes of a batch norm: weight, bias, mean and variance, and a count of eight."""
    return 16 * c + 8


def bytes_by_hand(*, packed: bool) -> int:
    """binaryvit_tiny's: linear layers, batch norms, vectors of four bytes a channel."""
    total = 4 * (3 * PATCH**2 + 1) * WIDTHS[0] + norm(WIDTHS[0]) + norm(WIDTHS[-1]) + 4 * (WIDTHS[-1] + 1) * CLASSES
    for stage, (c, depth, ratio) in enumerate(zip(WIDTHS, DEPTHS, RATIOS, strict=True)):
        layers = 5 if KEYS[stage] < SIDES[stage] else 4
        attention = layers * linear(c, c, packed=packed) + norm(c) + 4 * (3 * c + 3 * c + 1)  # RPReLU, moves, step
        mlp = linear(c, ratio * c, packed=packed) + linear(ratio * c, c, packed=packed)
        total += depth * (attention + mlp + 2 * norm(c) + 4 * 2 * c * (2 + 4))  # affine: 2 residual, 4 branches
        total += 4 * SIDES[stage] ** 2 * c
        if stage:  # what is added before the sign is per channel, not per weight
            total += norm(c // 2) + linear(4 * (c // 2), c, packed=packed) - 4 * 3 * (c // 2)
    return total


def test_bytes_of_a_model_equal_a_formula() -> None:
    model = tiny()
    assert count_packed_bytes(model) == bytes_by_hand(packed=True)
    assert count_float_bytes(model) == bytes_by_hand(packed=False)
    assert count_float_bytes(model) == sum(value.nbytes for value in model.state_dict().values())


def test_packed_bytes_equal_those_of_the_packed_model() -> None:
    for options in ({}, {"downsampling": False}):
        model = tiny(**options)
        expected = count_packed_bytes(model)
        state = pack(model).state_dict()
        assert sum(value.nbytes for value in state.values()) == expected == count_packed_bytes(model)


def test_bytes_do_not_depend_on_the_precision() -> None:
    model = tiny()
    assert (count_packed_bytes(model.bfloat16()), count_float_bytes(model)) == (
        count_packed_bytes(tiny()),
        count_float_bytes(tiny()),
    )


def test_only_one_bit_weights_are_packed() -> None:
    for options in (NO_BITS, NO_BITS | {"attention": True}, NO_BITS | {"activations": True}):
        model = tiny(**options)
        assert count_packed_bytes(model) == count_float_bytes(model)
    weights = tiny(**NO_BITS | {"weights": True})
    assert count_float_bytes(weights) - count_packed_bytes(weights) == count_float_bytes(tiny()) - count_packed_bytes(
        tiny()
    )


# What comes out


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(benchmark, "SECONDS", 1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a BinaryViT on a few digits."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--train-fraction", "0.1", "--epochs", "1", "--batch-size", "64", "--out", str(folder)]
    assert main(["train", "--arch", "binaryvit_tiny", *flags]) == 0
    return folder


def profiled() -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in json.loads(Path("out/profile.json").read_text())["rows"]}


@pytest.mark.slow
def test_a_profile_has_columns_for_one_bit_layers(smallvit: Command) -> None:
    twin = "binaryvit_tiny,binary-activations=false,binary-attention=false,binary-weights=false"
    code, out, err = smallvit("profile", "binaryvit_tiny", twin, "vit+binary", *FLAGS, "--img-size", 32)
    assert code == 0, err
    assert tables.BINARY_NOTE in out
    result, page = profiled(), Path("out/profile.md").read_text()
    binary, full = result["binaryvit_tiny"], result[twin]
    assert (binary["bops"], binary["flops"]) == bops_and_flops(tiny())
    assert (binary["packed_bytes"], binary["float_bytes"]) == tuple(bytes_by_hand(packed=x) for x in (True, False))
    assert (full["bops"], full["ops"], full["packed_bytes"]) == (0, full["macs"], full["float_bytes"])
    assert full["macs"] == binary["macs"]
    for row in result.values():
        shown = [row["macs"] / 1e6, row["bops"] / 1e6, row["ops"] / 1e6]
        assert f"| {' | '.join(f'{value:,.1f}' for value in shown)} | {row['packed_bytes'] / 1e6:,.2f} |" in page


def test_one_bit_weights_alone_add_the_columns() -> None:
    row = {"bops": 0, "packed_bytes": 9, "float_bytes": 10}
    assert list(tables.with_binary_columns({"macs": "MACs", "x": "x"}, [row])) == ["macs", *tables.BINARY_TITLES, "x"]


def test_tables_without_one_bit_layers_have_no_such_columns(smallvit: Command) -> None:
    titles = {"model": "model", "macs": "MACs (M)", "x": "x"}
    for plain in ({}, {"bops": None}, {"bops": 0, "packed_bytes": 10, "float_bytes": 10}):
        assert tables.with_binary_columns(titles, [plain]) == titles
        assert tables.binary_notes([plain]) == []
    assert smallvit("profile", "vit96", *FLAGS, "--img-size", 16)[0] == 0
    row = profiled()["vit96"]
    assert (row["bops"], row["flops"], row["ops"]) == (0, row["macs"], row["macs"])
    assert row["packed_bytes"] == row["float_bytes"] == 4 * row["parameters"]
    result = json.loads(Path("out/profile.json").read_text())
    assert not {*tables.BINARY_TITLES} & {*profile.get_columns(result)}
    assert "one bit" not in Path("out/profile.md").read_text()


@pytest.mark.slow
def test_summary_and_profile_of_a_run_agree(run: Path, smallvit: Command) -> None:
    summary, model = json.loads((run / "summary.json").read_text()), package.load_model(run)
    result = count_operations(model, count_macs_by_layer(model, 1, 8))
    assert (summary["macs"], summary["bops"], summary["ops"]) == (result.macs, result.bops, result.ops)
    assert summary["bops"] > 0.9 * summary["macs"]
    assert (summary["packed_bytes"], summary["float_bytes"]) == (count_packed_bytes(model), count_float_bytes(model))
    assert smallvit("profile", run, *FLAGS)[0] == 0
    row = profiled()[str(run)]
    assert {name: row[name] for name in tables.BINARY_FIGURES} == {
        name: summary[name] for name in tables.BINARY_FIGURES
    }


@pytest.mark.slow
def test_a_comparison_has_columns_for_one_bit_layers(run: Path, smallvit: Command) -> None:
    code, out, err = smallvit("compare", run, "--no-speed", "--out", "out")
    assert code == 0, err
    summary = json.loads((run / "summary.json").read_text())
    page = Path("out/compare.md").read_text()
    head, line = ([c.strip() for c in each.split("|")] for each in (page.splitlines()[2], page.splitlines()[4]))
    shown = dict(zip(head, line, strict=True))
    assert shown["BOPs (M)"] == f"{summary['bops'] / 1e6:.1f}"
    assert shown["OPs (M)"] == f"{summary['ops'] / 1e6:.1f}"
    assert shown["packed (MB)"] == f"{summary['packed_bytes'] / 1e6:.2f}"
    assert tables.BINARY_NOTE in page
    assert tables.BINARY_NOTE in out
