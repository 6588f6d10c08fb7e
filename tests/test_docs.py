"""The documents keep their word: their tables are what the models measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from smallvit.convnets import CIFAR_RESNETS
from smallvit.models import create_model
from smallvit.plugins import ShiftedPatchTokenization
from smallvit.profile import count_macs, count_parameters
from smallvit.published import PUBLISHED
from smallvit.stems import fit_for

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED_MACS = {  # arXiv:2112.13492 at 64 px, in millions: plain, and with both plugins
    "vit": (189.8, 199.2),
    "cait": (613.8, 623.3),
    "pit": (279.2, 322.9),
    "swin": (242.3, 284.9),
    "t2t": (643.0, 671.4),
}


def saved_by_windows(arch: str) -> int:
    """Multiply-accumulates at 64 px that SPT spares by cutting windows once, instead of five views."""
    model = create_model(arch, img_size=64, num_classes=200, spt=True, lsa=True).eval()
    spared = []

    def count(layer: ShiftedPatchTokenization, _: tuple, tokens: torch.Tensor) -> None:
        (y, z), places = layer.views.window, tokens[0].numel()
        spared.append(places * (layer.proj.in_features - layer.in_channels * y * z))

    for module in model.modules():
        if isinstance(module, ShiftedPatchTokenization):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    return sum(spared)


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_table_of_models_is_what_they_measure(arch: str, plugins: bool) -> None:
    small = create_model(arch, img_size=32, num_classes=10, spt=plugins, lsa=plugins)
    large = create_model(arch, img_size=64, num_classes=200, spt=plugins, lsa=plugins)
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
    assert "| " + " | ".join(row) + " |" in (DOCS / "models.md").read_text()


@pytest.mark.parametrize("arch", [*CIFAR_RESNETS, "resnet18"])
def test_the_table_of_cnns_is_what_they_measure(arch: str) -> None:
    small, large = (create_model(arch, img_size=size, num_classes=n) for size, n in ((32, 10), (64, 200)))
    parameters = [f"{count_parameters(model):,}" for model in (small, large)]
    macs = [f"{count_macs(small, 3, 32) / 1e6:.1f}", f"{count_macs(large, 3, 64) / 1e6:.1f}"]
    assert "| " + " | ".join([arch, *parameters, *macs]) + " |" in (DOCS / "models.md").read_text()


def test_the_table_of_strides_is_what_timms_cnns_get() -> None:
    page = (DOCS / "models.md").read_text()
    sizes, strides = (
        re.search(rf"^\| {head} \|(.*)\|$", page, re.MULTILINE)[1] for head in ("images, px", "stride .*?")
    )
    limits, strides = re.findall(r"\d+", sizes), [int(stride) for stride in strides.split("|")]
    assert len(limits) == len(strides) - 1
    for limit, stride, above in zip(map(int, limits), strides, strides[1:], strict=False):
        for img_size, expected in ((limit, stride), (limit + 1, above)):
            fit = fit_for("resnet18", img_size)
            assert (fit.stride if fit else 32) == expected


def test_every_row_of_the_table_is_tested() -> None:
    rows = re.findall(r"^\| ((?:vit|cait|pit|swin|t2t)[^|]*) \|", (DOCS / "models.md").read_text(), re.MULTILINE)
    assert rows == [arch + plugins for arch in PUBLISHED for plugins in ("", " + SPT + LSA")]
