"""Recompute the tables in docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from smallvit.models.architectures import CIFAR_RESNETS, LEE2021
from smallvit.models.factory import create_model
from smallvit.models.small_stems import plan_stem
from smallvit.plugins.spt_layer import ShiftedPatchTokenization
from smallvit.profiling.flops import count_macs, count_parameters

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED_MACS = {  # arXiv:2112.13492 at 64 px, in millions: plain, and with both plugins
    "vit": (189.8, 199.2),
    "cait": (613.8, 623.3),
    "pit": (279.2, 322.9),
    "swin": (242.3, 284.9),
    "t2t": (643.0, 671.4),
}


def saved_by_windows(arch: str) -> int:
    """Return the multiply-accumulates at 64 px that SPT saves by reading one window instead of five views."""
    model = create_model(arch, img_size=64, num_classes=200, plugins={"spt": True, "lsa": True}).eval()
    saved = []

    def count(layer: ShiftedPatchTokenization, _: tuple, tokens: torch.Tensor) -> None:
        (y, z), positions = layer.views.window, tokens[0].numel()
        saved.append(positions * (layer.proj.in_features - layer.in_channels * y * z))

    for module in model.modules():
        if isinstance(module, ShiftedPatchTokenization):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    return sum(saved)


@pytest.mark.slow
def test_table_of_models() -> None:
    page = (DOCS / "models.md").read_text()
    rows = [model_row(arch, plugins) for arch in LEE2021 for plugins in (False, True)]
    assert [row for row in rows if row not in page] == []


def model_row(arch: str, plugins: bool) -> str:
    """Return a row of the table: parameters at 32 and 64 px, and MACs in millions."""
    small = create_model(arch, img_size=32, num_classes=10, plugins={"spt": plugins, "lsa": plugins})
    large = create_model(arch, img_size=64, num_classes=200, plugins={"spt": plugins, "lsa": plugins})
    macs = count_macs(large, 3, 64)
    as_views = macs + (saved_by_windows(arch) if plugins else 0)
    published = PUBLISHED_MACS[arch][plugins]
    row = [
        arch + (" + SPT + LSA" if plugins else ""),
        f"{count_parameters(small):,}",
        f"{count_parameters(large):,}",
        f"{macs / 1e6:.1f}",
        f"{as_views / 1e6:.1f}",
        f"{published}",
        f"{100 * (as_views / 1e6 / published - 1):+.1f} %",
    ]
    return "| " + " | ".join(row) + " |"


def test_table_of_cnns() -> None:
    page = (DOCS / "models.md").read_text()
    rows = [cnn_row(arch) for arch in (*CIFAR_RESNETS, "resnet18")]
    assert [row for row in rows if row not in page] == []


def cnn_row(arch: str) -> str:
    """Return a row of the table: parameters and MACs in millions at 32 and 64 px."""
    small, large = (create_model(arch, img_size=size, num_classes=n) for size, n in ((32, 10), (64, 200)))
    parameters = [f"{count_parameters(model):,}" for model in (small, large)]
    macs = [f"{count_macs(small, 3, 32) / 1e6:.1f}", f"{count_macs(large, 3, 64) / 1e6:.1f}"]
    return "| " + " | ".join([arch, *parameters, *macs]) + " |"


def test_table_of_strides() -> None:
    page = (DOCS / "models.md").read_text()
    sizes, strides = (
        re.search(rf"^\| {head} \|(.*)\|$", page, re.MULTILINE)[1] for head in ("images, px", "stride .*?")
    )
    limits, strides = re.findall(r"\d+", sizes), [int(stride) for stride in strides.split("|")]
    assert len(limits) == len(strides) - 1
    for limit, stride, above in zip(map(int, limits), strides, strides[1:], strict=False):
        for img_size, expected in ((limit, stride), (limit + 1, above)):
            fit = plan_stem("resnet18", img_size)
            assert (fit.stride if fit else 32) == expected


def test_table_has_no_other_rows() -> None:
    table, _, _ = (DOCS / "models.md").read_text().partition("### Initial values")
    rows = re.findall(r"^\| ((?:vit|cait|pit|swin|t2t)[^|]*) \|", table, re.MULTILINE)
    assert rows == [arch + plugins for arch in LEE2021 for plugins in ("", " + SPT + LSA")]
