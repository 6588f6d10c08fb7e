"""Test BinaryViT's architecture: every part against the equations, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smallvit
from smallvit import InputError
from smallvit.config.model import BINARYVIT_PARTS
from smallvit.models import factory
from smallvit.models.binaryvit import KERNELS, BinaryViT, Block, PoolBranches
from smallvit.plugins import BinaryConfig
from smallvit.plugins.binary_layers import Binary, BinaryAttending

from ..plugins.test_binary_layers import STEP, agree, convolution, linear, normed, shortcut_attention, stirred

SMALL = {
    "embed_dims": (8, 16, 32, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "mlp_ratios": (4, 4, 2, 2),
    "sr_ratios": (8, 4, 1, 1),
}
FLAT = {"embed_dims": (16,), "depths": (2,), "num_heads": (2,), "mlp_ratios": (4,), "sr_ratios": (1,)}


def small(
    img_size: int | tuple[int, int] = 8,
    *,
    bits: bool = True,
    downsampling: bool = True,
    size: dict[str, tuple[int, ...]] = SMALL,
    **parts: Any,
) -> BinaryViT:
    torch.manual_seed(0)
    model = BinaryViT(img_size, 1 if size is SMALL else 4, num_classes=5, **size, **parts)
    return smallvit.patch(model, binary=BinaryConfig(step=STEP, downsampling=downsampling)) if bits else model


def tiny(img_size: int = 8, **options: Any) -> nn.Module:
    return factory.create_model("binaryvit_tiny", **{"img_size": img_size, "num_classes": 5} | options)


def pixels(size: int = 8, batch: int = 4, chans: int = 3) -> Tensor:
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(3))


# The equations


def average_pool(maps: Tensor, height: int, width: int) -> Tensor:
    """Average-pool feature maps (b, i, j, c), with zero padding that counts."""
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
        average_pool(maps, *sides) * own.weight + own.bias
        for sides, own in zip(((1, 3), (3, 1), (1, 5), (5, 1)), branches.affine, strict=True)
    )
    return torch.cat([torch.zeros_like(y[:, :prefix]), total.flatten(1, 2)], dim=1)


def block(x: Tensor, layer: Block, grid: tuple[int, int]) -> Tensor:
    x = x + affine(shortcut_attention(normed(x, layer.norm1), layer.attn, grid), layer.scale1)
    y = normed(x, layer.norm2)
    x = x + affine(linear(linear(y, layer.mlp.fc1), layer.mlp.fc2), layer.scale2)
    return x if layer.branches is None else x + pooled(y, layer.branches, grid)


def whole(images: Tensor, model: BinaryViT) -> Tensor:
    """Compute the logits."""
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
VARIANTS = {
    "BinaryViT": ALL,
    "full precision": ALL | {"bits": False},
    "downsampling in full precision": ALL | {"downsampling": False},
    "class token": ALL | {"avg_pool_head": False},
    "no branches": ALL | {"pool_branches": False},
    "no affine": ALL | {"residual_affine": False},
    "DeiT": dict.fromkeys(ALL, False) | {"size": FLAT},
}


@pytest.mark.parametrize("training", [True, False], ids=("training", "evaluation"))
@pytest.mark.parametrize(
    "switches",
    [pytest.param(v, id=k, marks=() if k in ("BinaryViT", "DeiT") else pytest.mark.slow) for k, v in VARIANTS.items()],
)
def test_model_equals_the_equations(switches: dict[str, Any], training: bool) -> None:
    model = stirred(small(8, **switches)).train(training)
    agree(model, whole, pixels(8, 3).double(), near=1e-5)


def test_pool_branches_read_lines_of_three_and_five_tokens() -> None:
    """Check an impulse: each branch spreads it along its line by a third or a fifth."""
    branches = PoolBranches(1)
    image = torch.zeros(1, 49, 1)
    image[0, 24] = 1.0
    expected = torch.zeros(7, 7)
    with torch.no_grad():
        for number, own in enumerate(branches.affine):
            own.weight.fill_(10.0**number)
    for share, indices in ((1 / 3, (2, 3, 4)), (100 / 5, (1, 2, 3, 4, 5))):
        for index in indices:
            expected[3, index] += share
    for share, indices in ((10 / 3, (2, 3, 4)), (1000 / 5, (1, 2, 3, 4, 5))):
        for index in indices:
            expected[index, 3] += share
    assert KERNELS == ((1, 3), (3, 1), (1, 5), (5, 1))
    torch.testing.assert_close(branches(image, (7, 7)).reshape(7, 7), expected)


# Initialization


def test_pool_branches_start_at_zero() -> None:
    one, two = small(), small(pool_branches=False)
    one.load_state_dict(two.state_dict(), strict=False)
    assert torch.equal(one.eval()(pixels()), two.eval()(pixels()))
    one.train()(pixels()).square().sum().backward()
    assert all(own.weight.grad.abs().sum() > 0 for each in one.stages for own in each.blocks[0].branches.affine)


def test_initial_values_are_the_published_ones() -> None:
    model = tiny()
    for own in (each for stage in model.stages for each in stage.blocks):
        assert own.scale1.weight.eq(0.1).all()
        assert own.scale2.weight.eq(0.1).all()
        assert not own.scale1.bias.any()
        assert own.attn.log_step.exp().item() == pytest.approx(0.005)
        assert not own.attn.moves.any()
        assert own.mlp.fc1.act.slope.eq(0.25).all()
        assert not own.mlp.fc1.move.any()


def test_initialization_is_torchs_except_for_position_embeddings_and_class_token() -> None:
    """Check a uniform distribution up to 1/√fan_in for weights and biases: the official `init_weights` never runs."""
    torch.manual_seed(0)
    model = tiny(32, avg_pool_head=False)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert {model.head, model.patch_embed.proj} < {*layers}
    for layer in layers:
        bound = layer.weight[0].numel() ** -0.5
        for value in (layer.weight, layer.bias):
            if value is not None:
                assert value.abs().max() <= bound
                assert value.numel() < 100 or value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    for value in (model.cls_token, *(stage.pos_embed for stage in model.stages)):
        assert value.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(("downsampling", "parameters"), [(True, 22_491_771), (False, 22_488_635)])
def test_parameters_equal_the_official_code(downsampling: bool, parameters: int) -> None:
    model = factory.create_model(
        "binaryvit", img_size=224, num_classes=1000, plugins={"binary": {"downsampling": downsampling}}
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert [len(stage.blocks) for stage in model.stages] == [3, 4, 8, 4]
    assert [stage.pos_embed.shape[1:] for stage in model.stages] == [
        (56 * 56, 64), (28 * 28, 128), (14 * 14, 256), (7 * 7, 512)
    ]  # fmt: skip
    assert [stage.blocks[0].attn.sr_ratio for stage in model.stages] == [8, 4, 1, 1]
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 4, 8]
    assert [stage.blocks[0].mlp.fc1.out_features for stage in model.stages] == [512, 1024, 1024, 2048]


def test_single_stage_model_has_about_as_many_parameters() -> None:
    sizes = [sum(parameter.numel() for parameter in tiny(32, pyramid=on).parameters()) for on in (True, False)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


# Binary layers


def test_blocks_and_patch_merging_are_binary() -> None:
    model = tiny()
    binary = {name for name, layer in model.named_modules() if isinstance(layer, Binary)}
    blocks = {
        f"stages.{s}.blocks.{b}": own for s, stage in enumerate(model.stages) for b, own in enumerate(stage.blocks)
    }
    within = ("attn", "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"{name}.{each}" for name in blocks for each in within}
    expected |= {f"{name}.attn.reduce" for name, own in blocks.items() if own.attn.sr_ratio > 1}
    assert binary == expected | {f"stages.{number}.downsample.conv" for number in (1, 2, 3)}
    assert sum(own.attn.sr_ratio > 1 for own in blocks.values()) == 2


def test_patch_merging_in_full_precision_as_in_the_starred_variant() -> None:
    """Check BatchNorm, convolution, BatchNorm without shortcut and RPReLU, as in the official code."""
    model = tiny(plugins={"binary": {"downsampling": False}})
    norm = nn.BatchNorm2d(1).state_dict()
    for stage in list(model.stages)[1:]:
        assert not isinstance(stage.downsample.conv, Binary)
        expected = {"conv.weight", *(f"{own}.{name}" for own in ("norm", "conv.norm") for name in norm)}
        assert stage.downsample.state_dict().keys() == expected
    assert isinstance(model.stages[0].blocks[0].attn, BinaryAttending)


def test_unpatched_model_equals_the_full_precision_model() -> None:
    torch.manual_seed(0)
    twin = tiny(plugins={"binary": False}).eval()
    torch.manual_seed(0)
    model = tiny().eval()
    assert not torch.equal(model(pixels()), twin(pixels()))
    smallvit.unpatch(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert torch.equal(model(pixels()), twin(pixels()))


def test_patched_full_precision_model_equals_the_binary_model() -> None:
    torch.manual_seed(0)
    twin = tiny(plugins={"binary": False})
    torch.manual_seed(0)
    model = tiny()
    x = pixels()
    assert torch.equal(smallvit.patch(twin, binary=True).eval()(x), model.eval()(x))


@pytest.mark.parametrize("part", BINARYVIT_PARTS)
def test_binaryvit_options_are_errors_for_other_architectures(part: str) -> None:
    message = f"--no-{part.replace('_', '-')}: --arch vit is not a BinaryViT; remove it"
    with pytest.raises(InputError, match=f"^{message}$"):
        factory.create_model("vit", img_size=32, num_classes=5, **{part: False})


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("swin", {"plugins": {"binary": True}}),
        ("cait", {"plugins": {"binary": True}}),
        ("swin", {"plugins": {"binary": {"weights": False, "activations": False}}}),
        ("resnet20", {"plugins": {"binary": True}}),
        ("binaryvit_tiny", {"plugins": {"lsa": True}}),
        ("binaryvit_tiny", {"dist_token": True}),
        ("binaryvit_tiny", {"dropout": 0.1}),
    ],
    ids=str,
)
def test_incompatible_options_are_errors_of_one_line(arch: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{arch}") as caught:
        factory.create_model(arch, img_size=32, num_classes=5, **options)
    assert "\n" not in str(caught.value)


def test_spt_and_binary_layers_combine() -> None:
    model = tiny(plugins={"spt": True})
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "binary"}
    model(pixels()).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
