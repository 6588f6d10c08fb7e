"""Shifted patch tokenization against an oracle written from the paper's equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smallvit.plugins.spt import ShiftedPatchTokenization

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


def naive_spt(x: Tensor, layer: ShiftedPatchTokenization) -> Tensor:
    """S(x) = LN(P([x s¹ s² s³ s⁴])) E, one pixel at a time."""
    (b, c, h, w), (p, q) = x.shape, layer.patch_size
    s, t = max(1, p // 2), max(1, q // 2)
    shifts = [(0, 0), (-s, -t), (-s, t), (s, -t), (s, t)]  # left-up, right-up, left-down, right-down
    zero = torch.zeros((), dtype=x.dtype)
    tokens = []
    for image in x:
        for i in range(h // p):
            for j in range(w // q):
                values = []
                for down, right in shifts:
                    for channel in range(c):
                        for row in range(i * p, i * p + p):
                            for column in range(j * q, j * q + q):
                                y, z = row + down, column + right
                                inside = 0 <= y < h and 0 <= z < w
                                values.append(image[channel, y, z] if inside else zero)
                v = torch.stack(values)
                normal = (v - v.mean()) / (v.var(unbiased=False) + layer.norm.eps).sqrt()
                tokens.append(layer.proj.weight @ (normal * layer.norm.weight + layer.norm.bias) + layer.proj.bias)
    return torch.stack(tokens).view(b, h // p, w // q, -1).permute(0, 3, 1, 2)


def layer_and_image(case: tuple, dtype: torch.dtype = torch.float32) -> tuple[ShiftedPatchTokenization, Tensor]:
    c, h, w, patch = case
    torch.manual_seed(0)
    layer = ShiftedPatchTokenization(c, 6, patch).to(dtype)
    nn.init.normal_(layer.norm.weight, 1, 0.3)
    nn.init.normal_(layer.norm.bias)
    nn.init.normal_(layer.proj.bias)
    return layer, torch.randn(2, c, h, w, dtype=dtype) + 0.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_spt_equals_the_equation_forward_and_in_every_gradient(case: tuple) -> None:
    layer, image = layer_and_image(case)
    inputs = [image.requires_grad_(), *layer.parameters()]
    ours, theirs = layer(image), naive_spt(image, layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, oracle in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-5 * oracle.abs().max().item() + 1e-6)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
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


@pytest.mark.parametrize("level", [0.0, -0.8, 2.3, 250.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spt_gives_the_bias_alone_inside_a_blank_image(level: float, dtype: torch.dtype) -> None:
    layer, _ = layer_and_image((3, 16, 16, (4, 4)))
    expected = layer.proj.weight @ layer.norm.bias + layer.proj.bias
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens = layer(torch.full((1, 3, 16, 16), level))[..., 1:3, 1:3].float()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(tokens, expected[None, :, None, None].expand_as(tokens), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 0.05)])
def test_spt_keeps_its_precision_where_contrast_is_low(dtype: torch.dtype, tolerance: float) -> None:
    """White paper, snow, a scan: grey levels of 250 ± 1, normalised as images are."""
    layer, noise = layer_and_image((3, 16, 16, (4, 4)))
    image = ((250 + noise.clamp(-2, 2)) / 255 - 0.5) / 0.27
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours = layer(image).float()
    exact = naive_spt(image.double(), layer.double())
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


def test_spt_ignores_the_brightness_and_contrast_of_an_inner_patch() -> None:
    """LayerNorm sees only inner pixels there, so an affine change of the image leaves the token as it is."""
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


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 2, 2, groups=2)]
)
def test_spt_refuses_convolutions_that_cut_no_patches(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="cut patches"):
        ShiftedPatchTokenization.from_conv(conv)


def test_spt_compiles_to_one_graph_with_the_same_output() -> None:
    layer, image = layer_and_image(CASES[0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), layer(image))
