"""Shifted patch tokenization against an oracle written from the paper's equation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from smallvit.plugins.spt import SPTConfig
from smallvit.plugins.spt_layer import ShiftedPatchMerging, ShiftedPatchTokenization, Views

from .pixels import cut, shifts
from .sweep import each, sweep

# channels, height, width, patch: square and not, even, odd and 1, with and without a remainder at the border
CASES = [
    (3, 8, 8, (4, 4)),
    (1, 8, 8, (2, 2)),
    (3, 9, 12, (3, 3)),
    (2, 10, 15, (5, 5)),
    (3, 6, 4, (1, 1)),
    (2, 8, 12, (2, 4)),
    (2, 9, 10, (3, 2)),
    (1, 6, 8, (1, 4)),
    (3, 11, 13, (4, 4)),
]


CONFIGS = {
    "paper": SPTConfig(),
    "cardinal": SPTConfig(directions="cardinal"),
    "all": SPTConfig(directions="all"),
    "a quarter": SPTConfig(shift=0.25),
    "a whole patch": SPTConfig(shift=1.0),
    "no norm": SPTConfig(norm=False),
    "all, a whole patch, no norm": SPTConfig(directions="all", shift=1.0, norm=False),
}
GEOMETRIES: dict[str, tuple[tuple, dict]] = {
    "side by side": ((3, 8, 8, (4, 4)), {}),
    "not square": ((2, 6, 12, (3, 4)), {}),
    "overlapping": ((2, 11, 10, (4, 4)), {"stride": 2}),
    "overlapping, not square": ((1, 9, 13, (3, 5)), {"stride": (1, 3)}),
    "padded": ((2, 9, 12, (7, 7)), {"stride": 4, "padding": 3}),
    "padded at the sides": ((2, 8, 7, (4, 3)), {"padding": (0, 1)}),
    "rounded up": ((2, 9, 11, (2, 4)), {"ceil_mode": True}),
    "rounded up, overlapping": ((2, 10, 12, (3, 4)), {"stride": (2, 3), "ceil_mode": True}),
}


def naive_spt(x: Tensor, layer: ShiftedPatchTokenization) -> Tensor:
    """S(x) = LN(P([x s¹ s² s³ s⁴])) E, one pixel at a time."""
    config, patch = layer.config, layer.patch_size
    views = [(0, 0), *shifts(patch, config.directions, config.shift)]
    v = cut(x, patch, views, layer.stride, layer.padding, layer.ceil_mode).flatten(3)
    if config.norm:
        normal = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + layer.norm.eps).sqrt()
        v = normal * layer.norm.weight + layer.norm.bias
    return torch.einsum("bijn,en->beij", v, layer.proj.weight) + layer.proj.bias[:, None, None]


def layer_and_image(
    case: tuple, dtype: torch.dtype = torch.float32, **arguments: object
) -> tuple[ShiftedPatchTokenization, Tensor]:
    c, h, w, patch = case
    torch.manual_seed(0)
    layer = ShiftedPatchTokenization(c, 6, patch, **arguments).to(dtype)
    if layer.config.norm:
        nn.init.normal_(layer.norm.weight, 1, 0.3)
        nn.init.normal_(layer.norm.bias)
    nn.init.normal_(layer.proj.bias)
    return layer, torch.randn(2, c, h, w, dtype=dtype) + 0.5


def assert_equals_the_equation(layer: nn.Module, image: Tensor, oracle: Callable[[Tensor, nn.Module], Tensor]) -> None:
    inputs = [image.requires_grad_(), *layer.parameters()]
    ours, theirs = layer(image), oracle(image, layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-6)


@each(CASES, "case")
def test_spt_equals_the_equation_forward_and_in_every_gradient(case: tuple) -> None:
    assert_equals_the_equation(*layer_and_image(case), naive_spt)


@sweep(GEOMETRIES, "geometry", quick=GEOMETRIES)
@each(CONFIGS, "config")
@each([False, True], "features")
def test_every_variant_equals_the_equation_in_every_geometry(config: str, geometry: str, features: bool) -> None:
    case, arguments = GEOMETRIES[geometry]
    layer, image = layer_and_image(case, config=CONFIGS[config], features=features, **arguments)
    assert_equals_the_equation(layer, image, naive_spt)


@pytest.mark.parametrize(
    ("case", "arguments"),
    [((1, 6, 7, (3, 3)), {"stride": 2}), ((1, 6, 8, (3, 3)), {"padding": 1})],
    ids=["overlapping", "padded"],
)
def test_rounding_up_leaves_no_pixel_without_a_token(case: tuple, arguments: dict) -> None:
    layer, image = layer_and_image(case, ceil_mode=True, config=SPTConfig(norm=False), **arguments)
    layer(image.requires_grad_()).square().sum().backward()
    assert image.grad.ne(0).all()
    assert_equals_the_equation(layer, image.detach(), naive_spt)


@each(CONFIGS, "config")
@each([(4, 6), (5, 6), (5, 7), (1, 1), (2, 3)], "size")
def test_merging_equals_the_equation_with_patches_of_two(config: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = ShiftedPatchMerging(3, 6, CONFIGS[config])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    channels_first = lambda x, layer: naive_spt(x.permute(0, 3, 1, 2), layer).permute(0, 2, 3, 1)  # noqa: E731
    image = torch.randn(2, *size, 3)
    assert layer(image).shape == (2, -(-size[0] // 2), -(-size[1] // 2), 6)
    assert_equals_the_equation(layer, image, channels_first)


@each([(1, 1), (2, 2), (3, 5), (4, 4), (7, 7)], "patch")
@each([0.1, 0.25, 0.5, 1.0], "share")
def test_a_view_is_shifted_by_a_share_of_the_patch_rounded_down_and_at_least_a_pixel(
    patch: tuple[int, int], share: float
) -> None:
    views = Views(patch, SPTConfig(shift=share))
    assert views.shift == shifts(patch, "diagonal", share)[-1]
    assert views.window == (patch[0] + 2 * views.shift[0], patch[1] + 2 * views.shift[1])


def test_spt_as_published_has_four_diagonal_views_of_half_a_patch_and_a_norm() -> None:
    assert SPTConfig() == SPTConfig(directions="diagonal", shift=0.5, norm=True)
    layer = ShiftedPatchTokenization(3, 6, 4)
    assert layer.config == SPTConfig()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "norm.weight": (240,),
        "norm.bias": (240,),
        "proj.weight": (6, 240),
        "proj.bias": (6,),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"directions": "up"}, "directions 'up'"), ({"shift": 0.0}, "shift 0.0"), ({"shift": 1.5}, "shift 1.5")],
    ids=str,
)
def test_spt_refuses_variants_that_there_are_not(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SPTConfig(**arguments)


@each(CASES[:4], "case")
def test_spt_under_bf16_autocast_stays_near_the_equation(case: tuple) -> None:
    layer, image = layer_and_image(case)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(image)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), naive_spt(image, layer), rtol=0.03, atol=0.05)


def test_spt_of_a_bf16_model_stays_near_the_equation() -> None:
    layer, image = layer_and_image(CASES[0])
    expected = naive_spt(image, layer)
    ours = layer.to(torch.bfloat16)(image.to(torch.bfloat16))
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.1)


@each([0.0, -0.8, 2.3, 250.0], "level")
@each([torch.float32, torch.bfloat16], "dtype")
def test_spt_gives_the_bias_alone_inside_a_blank_image(level: float, dtype: torch.dtype) -> None:
    layer, _ = layer_and_image((3, 16, 16, (4, 4)))
    expected = layer.proj.weight @ layer.norm.bias + layer.proj.bias
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens = layer(torch.full((1, 3, 16, 16), level))[..., 1:3, 1:3].float()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(tokens, expected[None, :, None, None].expand_as(tokens), rtol=tolerance, atol=tolerance)


@each([(torch.float32, 1e-2), (torch.bfloat16, 0.05)], "dtype", "tolerance")
def test_spt_keeps_its_precision_where_contrast_is_low(dtype: torch.dtype, tolerance: float) -> None:
    """White paper, snow, a scan: gray levels of 250 ± 1, normalized as images are."""
    layer, noise = layer_and_image((3, 16, 16, (4, 4)))
    image = ((250 + noise.clamp(-2, 2)) / 255 - 0.5) / 0.27
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = layer(image).float()
    exact = naive_spt(image.double(), layer.double())
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


def test_spt_ignores_the_brightness_and_contrast_of_an_inner_patch() -> None:
    """LayerNorm sees only inner pixels there, so an affine change of the image does not change the token."""
    layer, _ = layer_and_image((3, 16, 16, (4, 4)))
    image = torch.randn(1, 3, 16, 16)
    before, after = layer(image), layer(3 * image + 7)
    torch.testing.assert_close(after[..., 1:3, 1:3], before[..., 1:3, 1:3], rtol=1e-3, atol=1e-3)


def test_spt_token_depends_on_half_a_patch_around_and_no_further() -> None:
    layer, _ = layer_and_image((1, 12, 12, (4, 4)))
    image = torch.randn(1, 1, 12, 12).requires_grad_()
    layer(image)[0, :, 1, 1].sum().backward()
    reach = image.grad[0, 0] != 0
    assert reach[2:10, 2:10].all()
    assert reach.sum() == 64


def test_spt_survives_a_state_dict_round_trip() -> None:
    layer, image = layer_and_image(CASES[0])
    other = ShiftedPatchTokenization(3, 6, 4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(image), layer(image))


@pytest.mark.slow
@each([False, True], "features")
@each([False, True], "norm")
@sweep(GEOMETRIES, "geometry", quick=GEOMETRIES)
def test_spt_compiles_to_one_graph_with_the_same_output(geometry: str, norm: bool, features: bool) -> None:
    (c, h, w, patch), more = GEOMETRIES[geometry]
    torch.manual_seed(0)
    layer = ShiftedPatchTokenization(c, 6, patch, features=features, config=SPTConfig(norm=norm), **more)
    image = torch.randn(2, c, h, w)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), layer(image))
