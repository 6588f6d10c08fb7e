"""Test the depthwise convolution in MLPs against its equation, on all grids."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallvit
from smallvit.plugins import FFNConfig
from smallvit.plugins.ffn_timm import DepthwiseConv, patched
from smallvit.plugins.patch import UnsupportedModelError

VIT = {"img_size": (8, 16), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit, registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2}, (8, 16)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, (8, 16)),
    "cait": ("cait_xxs24_224", VIT | {"depth_token_only": 1}, (8, 16)),
    "pit": (
        "pit_ti_224",
        {"img_size": 20, "patch_size": 4, "stride": 2, "base_dims": (8,) * 3, "depth": (1,) * 3, "num_classes": 5},
        (20, 20),
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": (16, 32), "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1)}
        | {"num_heads": (2, 3), "num_classes": 5},
        (16, 32),
    ),
    "eva-02 (SwiGLU)": ("eva02_tiny_patch14_224", VIT | {"embed_dim": 48}, (8, 16)),
}


def build(name: str, **config: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    arch, arguments, size = MODELS[name]
    model = smallvit.patch(timm.create_model(arch, **arguments), ffn=FFNConfig(**config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval(), torch.randn(2, 3, *size)


def convolve(u: Tensor, layer: DepthwiseConv, rows: int, columns: int) -> Tensor:
    """Compute GELU(BN(DWConv(u))) of tokens (b, rows · columns, c), offset by offset."""
    grid = u.view(len(u), rows, columns, -1)
    padded = F.pad(grid, (0, 0, 1, 1, 1, 1))
    kernel = layer.conv.weight[:, 0]
    y = sum(
        padded[:, down : down + rows, right : right + columns] * kernel[:, down, right]
        for down in range(3)
        for right in range(3)
    )
    if layer.conv.bias is not None:
        y = y + layer.conv.bias
    if isinstance(norm := layer.norm, nn.BatchNorm2d):
        y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return F.gelu(y).flatten(1, 2)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_an_mlp_is_the_equation(norm: bool, residual: bool) -> None:
    model, _ = build("vit, registers", norm=norm, residual=residual)
    mlp = model.blocks[0].mlp
    x = torch.randn(2, 3 + 8, 24, requires_grad=True)
    u = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    v = convolve(u[:, 3:], mlp.drop1, 2, 4)
    hidden = torch.cat([u[:, :3], u[:, 3:] + v if residual else v], dim=1)
    expected = hidden @ mlp.fc2.weight.T + mlp.fc2.bias
    actual = mlp(x)
    torch.testing.assert_close(actual, expected)
    weights = [x, *mlp.parameters()]
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, weights, upstream), torch.autograd.grad(expected, weights, upstream)
    )


def test_reweighted_prefix_tokens_are_the_equation() -> None:
    model, _ = build("vit, registers", class_token="reweight")
    plain, _ = build("vit, registers")
    mlp, other = model.blocks[0].mlp, plain.blocks[0].mlp
    other.load_state_dict(mlp.state_dict(), strict=False)
    x = torch.randn(2, 3 + 8, 24)
    patches = other(x)[:, 3:]
    factors = mlp.excite(F.gelu(mlp.compress(patches.mean(dim=1))))
    torch.testing.assert_close(mlp(x), torch.cat([x[:, :3] * factors[:, None], patches], dim=1))


@pytest.mark.parametrize("name", MODELS)
def test_a_token_reaches_its_neighbors_on_the_grid_only(name: str) -> None:
    model, images = build(name)
    inputs = {}
    for layer_name, mlp in patched(model):
        mlp.register_forward_pre_hook(lambda _, args, key=layer_name: inputs.update({key: args[0]}))
    with torch.no_grad():
        model(images)
        for layer_name, mlp in patched(model):
            x, grid = inputs[layer_name], mlp.drop1.grid
            rows, columns = grid.shape(x.shape[1])
            assert grid.prefix + rows * columns == x.shape[1]
            changed = x.clone()
            row, column = rows // 2, columns // 2
            changed[:, grid.prefix + row * columns + column] += 1.0
            moved = (mlp(changed) - mlp(x)).abs().amax(dim=(0, 2)) > 1e-6
            reached = {
                grid.prefix + i * columns + j
                for i in range(rows)
                for j in range(columns)
                if abs(i - row) <= 1 and abs(j - column) <= 1
            }
            assert set(moved.nonzero().flatten().tolist()) == reached, layer_name


@pytest.mark.parametrize("norm", [True, False])
def test_preserving_initialization_keeps_the_outputs(norm: bool) -> None:
    arch, arguments, size = MODELS["vit, registers"]
    model, images = timm.create_model(arch, **arguments), torch.randn(2, 3, *size)
    before = model(images)
    smallvit.patch(model, init="preserve", ffn=FFNConfig(norm=norm))
    torch.testing.assert_close(model.train()(images), before)
    model(images).sum().backward()
    last = model.blocks[0].mlp.drop1.norm if norm else model.blocks[0].mlp.drop1.conv
    assert last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("class_token", ["mlp", "reweight"])
def test_unpatching_copying_and_pickling(class_token: str) -> None:
    arch, arguments, size = MODELS["vit, registers"]
    model, images = timm.create_model(arch, **arguments).eval(), torch.randn(2, 3, *size)
    before, keys = model(images), list(model.state_dict())
    smallvit.patch(model, ffn=FFNConfig(class_token=class_token))
    after = model(images)
    assert not torch.equal(before, after)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images), after)
    torch.testing.assert_close(copy.deepcopy(model)(images), after)
    smallvit.unpatch(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), before)


def test_the_image_size_can_change_afterwards() -> None:
    model, _ = build("vit, registers")
    smallvit.set_input_size(model, (16, 8))
    assert model.blocks[0].mlp.drop1.grid.shape(3 + 8) == (4, 2)
    model(torch.randn(1, 3, 16, 8))
    with pytest.raises(ValueError, match="neither the model's grid of 4x2 nor a square"):
        model.blocks[0].mlp(torch.randn(1, 3 + 6, 24))


@pytest.mark.parametrize(
    ("arch", "arguments", "reason"),
    [
        ("naflexvit_base_patch16_gap", {"embed_dim": 24, "depth": 1, "num_heads": 3}, "each image has its own grid"),
        ("vit_tiny_patch16_224", VIT | {"patch_drop_rate": 0.5}, "patch tokens are dropped in training"),
        ("resnet18", {}, "no layer of a known kind"),
    ],
)
def test_models_that_do_not_fit_are_refused(arch: str, arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        smallvit.patch(timm.create_model(arch, **arguments), ffn=True)
