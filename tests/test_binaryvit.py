"""BinaryViT's architecture: every part against the equations, its switches, and what timm asks of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit import InputError, models
from smallvit.binaryvit import BinaryViT, Size
from smallvit.binaryvit_blocks import KERNELS, Block, PoolBranches
from smallvit.options import BINARYVIT_PARTS
from smallvit.plugins import BinaryConfig
from smallvit.plugins.binary import Binary, BinaryAttending

from .plugins.test_binary_layers import STEP, agree, convolution, linear, normed, shortcut_attention, stirred

SMALL = Size(
    widths=(8, 16, 32, 64), depths=(1,) * 4, heads=(1, 2, 2, 4), mlp_ratios=(4, 4, 2, 2), reductions=(8, 4, 1, 1)
)
FLAT = Size(widths=(16,), depths=(2,), heads=(2,), mlp_ratios=(4,), reductions=(1,))


def small(img_size: int | tuple[int, int] = 8, *, bits: bool = True, size: Size = SMALL, **parts: Any) -> BinaryViT:
    torch.manual_seed(0)
    model = BinaryViT(img_size, 1 if size is SMALL else 4, size, num_classes=5, **parts)
    return smallvit.patch(model, binary=BinaryConfig(step=STEP)) if bits else model


def tiny(img_size: int = 8, **options: Any) -> nn.Module:
    return models.create_model("binaryvit_tiny", **{"img_size": img_size, "num_classes": 5} | options)


def pixels(size: int = 8, batch: int = 4, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(3))


# The equations


def mean_around(maps: Tensor, height: int, width: int) -> Tensor:
    """Of maps (b, i, j, c), zeros beyond the border, which count."""
    (rows, columns), total = maps.shape[1:3], torch.zeros_like(maps)
    padded = torch.nn.functional.pad(maps, (0, 0, 2, 2, 2, 2))
    for y in range(-(height // 2), height // 2 + 1):
        for z in range(-(width // 2), width // 2 + 1):
            total = total + padded[:, 2 + y : 2 + y + rows, 2 + z : 2 + z + columns]
    return total / (height * width)


def affine(x: Tensor, layer: nn.Module) -> Tensor:
    return x if isinstance(layer, nn.Identity) else x * layer.weight + layer.bias


def pooled(y: Tensor, branches: PoolBranches, grid: tuple[int, int]) -> Tensor:
    prefix = y.shape[1] - grid[0] * grid[1]
    maps = y[:, prefix:].unflatten(1, grid)
    total = sum(
        mean_around(maps, *sides) * own.weight + own.bias
        for sides, own in zip(((1, 3), (3, 1), (1, 5), (5, 1)), branches.affine, strict=True)
    )
    return torch.cat([torch.zeros_like(y[:, :prefix]), total.flatten(1, 2)], dim=1)


def block(x: Tensor, layer: Block, grid: tuple[int, int]) -> Tensor:
    x = x + affine(shortcut_attention(normed(x, layer.norm1), layer.attn, grid), layer.scale1)
    y = normed(x, layer.norm2)
    x = x + affine(linear(linear(y, layer.mlp.fc1), layer.mlp.fc2), layer.scale2)
    return x if layer.branches is None else x + pooled(y, layer.branches, grid)


def whole(images: Tensor, model: BinaryViT) -> Tensor:
    """Logits."""
    proj = model.patch_embed.proj
    x = nn.functional.conv2d(images, proj.weight, proj.bias, proj.stride).movedim(1, -1)
    x = normed(x, model.norm_embed)
    for number, stage in enumerate(model.stages):
        if number:
            maps = normed(x, stage.downsample.norm).movedim(-1, 1)
            x = convolution(maps, stage.downsample.conv).movedim(1, -1)
        grid = x.shape[1], x.shape[2]
        x = x.flatten(1, 2) + stage.pos_embed
        if model.cls_token is not None and number == len(model.stages) - 1:
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        for each in stage.blocks:
            x = block(x, each, grid)
        x = x if number == len(model.stages) - 1 else x.unflatten(1, grid)
    x = normed(x, model.norm)
    x = x.mean(1) if model.cls_token is None else x[:, 0]
    return x @ model.head.weight.T + model.head.bias


ALL = dict.fromkeys(BINARYVIT_PARTS[:3], True)
SWITCHED = {
    "BinaryViT": ALL,
    "full precision": ALL | {"bits": False},
    "class token": ALL | {"gap_head": False},
    "no branches": ALL | {"pool_branches": False},
    "no affine": ALL | {"residual_affine": False},
    "DeiT": dict.fromkeys(ALL, False) | {"size": FLAT},
}


@pytest.mark.parametrize("training", [True, False], ids=("training", "evaluation"))
@pytest.mark.parametrize("switches", SWITCHED.values(), ids=SWITCHED)
def test_the_model_is_the_equations(switches: dict[str, Any], training: bool) -> None:
    model = stirred(small(8, **switches)).train(training)
    agree(model, whole, pixels(8, 3).double(), near=1e-5)


def test_branches_see_lines_of_three_and_five_places() -> None:
    """An image of one bright place: each branch spreads it along its line, by a third or a fifth."""
    branches = PoolBranches(1)
    image = torch.zeros(1, 49, 1)
    image[0, 24] = 1.0
    expected = torch.zeros(7, 7)
    with torch.no_grad():
        for number, own in enumerate(branches.affine):
            own.weight.fill_(10.0**number)
    for share, places in ((1 / 3, (2, 3, 4)), (100 / 5, (1, 2, 3, 4, 5))):
        for place in places:
            expected[3, place] += share
    for share, places in ((10 / 3, (2, 3, 4)), (1000 / 5, (1, 2, 3, 4, 5))):
        for place in places:
            expected[place, 3] += share
    assert KERNELS == ((1, 3), (3, 1), (1, 5), (5, 1))
    torch.testing.assert_close(branches(image, (7, 7)).reshape(7, 7), expected)


# What it begins with


def test_a_model_with_branches_begins_as_one_without() -> None:
    one, two = small(), small(pool_branches=False)
    one.load_state_dict(two.state_dict(), strict=False)
    assert torch.equal(one.eval()(pixels()), two.eval()(pixels()))
    one.train()(pixels()).square().sum().backward()
    assert all(own.weight.grad.abs().sum() > 0 for each in one.stages for own in each.blocks[0].branches.affine)


def test_what_is_learnt_begins_as_published() -> None:
    model = tiny()
    for own in (each for stage in model.stages for each in stage.blocks):
        assert own.scale1.weight.eq(0.1).all()
        assert own.scale2.weight.eq(0.1).all()
        assert not own.scale1.bias.any()
        assert own.attn.log_step.exp().item() == pytest.approx(0.005)
        assert not own.attn.moves.any()
        assert own.mlp.fc1.act.slope.eq(0.25).all()
        assert not own.mlp.fc1.move.any()


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    model = models.create_model("binaryvit", img_size=224, num_classes=1000)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(22.6e6, rel=0.01)
    assert [len(stage.blocks) for stage in model.stages] == [3, 4, 8, 4]
    assert [stage.pos_embed.shape[1:] for stage in model.stages] == [
        (56 * 56, 64), (28 * 28, 128), (14 * 14, 256), (7 * 7, 512)
    ]  # fmt: skip
    assert [stage.blocks[0].attn.reduction for stage in model.stages] == [8, 4, 1, 1]
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 4, 8]
    assert [stage.blocks[0].mlp.fc1.out_features for stage in model.stages] == [512, 1024, 1024, 2048]


def test_without_its_pyramid_it_is_about_as_large() -> None:
    sizes = [sum(parameter.numel() for parameter in tiny(32, pyramid=on).parameters()) for on in (True, False)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


# Its bits


def test_blocks_and_mergings_have_bits_and_nothing_else_has() -> None:
    model = tiny()
    binary = {name for name, layer in model.named_modules() if isinstance(layer, Binary)}
    blocks = {
        f"stages.{s}.blocks.{b}": own for s, stage in enumerate(model.stages) for b, own in enumerate(stage.blocks)
    }
    within = ("attn", "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"{name}.{each}" for name in blocks for each in within}
    expected |= {f"{name}.attn.reduce" for name, own in blocks.items() if own.attn.reduction > 1}
    assert binary == expected | {f"stages.{number}.downsample.conv" for number in (1, 2, 3)}
    assert sum(own.attn.reduction > 1 for own in blocks.values()) == 2


def test_mergings_stay_in_full_precision_where_the_paper_has_a_star() -> None:
    model = tiny(binary_downsampling=False)
    assert not any(isinstance(stage.downsample.conv, Binary) for stage in list(model.stages)[1:])
    assert isinstance(model.stages[0].blocks[0].attn, BinaryAttending)


def test_a_model_without_bits_is_the_twin_of_one_whose_bits_are_taken_out() -> None:
    torch.manual_seed(0)
    twin = tiny(binary_weights=False, binary_activations=False, binary_attention=False).eval()
    torch.manual_seed(0)
    model = tiny().eval()
    assert not torch.equal(model(pixels()), twin(pixels()))
    smallvit.unpatch(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert torch.equal(model(pixels()), twin(pixels()))


def test_the_twin_has_no_bits_to_add_by_hand() -> None:
    torch.manual_seed(0)
    twin = tiny(binary_weights=False, binary_activations=False, binary_attention=False)
    torch.manual_seed(0)
    model = tiny()
    x = pixels()
    assert torch.equal(smallvit.patch(twin, binary=True).eval()(x), model.eval()(x))


@pytest.mark.parametrize("part", BINARYVIT_PARTS)
def test_switches_of_binaryvit_are_refused_by_others(part: str) -> None:
    told = f"--no-{part.replace('_', '-')}: --arch vit is no BinaryViT; leave it out"
    with pytest.raises(InputError, match=f"^{told}$"):
        models.create_model("vit", img_size=32, num_classes=5, **{part: False})


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("swin", {"binary": True}),
        ("cait", {"binary": True}),
        ("swin", {"binary": True, "binary_weights": False, "binary_activations": False}),
        ("resnet20", {"binary": True}),
        ("binaryvit_tiny", {"lsa": True}),
        ("binaryvit_tiny", {"dist_token": True}),
        ("binaryvit_tiny", {"dropout": 0.1}),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_told_in_one_line(arch: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{arch}") as caught:
        models.create_model(arch, img_size=32, num_classes=5, **options)
    assert "\n" not in str(caught.value)


def test_spt_joins_a_binaryvit() -> None:
    model = tiny(spt=True)
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "binary"}
    model(pixels()).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
