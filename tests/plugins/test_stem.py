"""Test the convolutional stem by its shapes, reach and equivariance."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import smallvit
from smallvit.plugins.patch import UnsupportedModelError
from smallvit.plugins.stem import StemConfig
from smallvit.plugins.stem_timm import ConvStem
from smallvit.utils.errors import InputError


@pytest.mark.parametrize(("patch", "channels"), [(2, [24]), (4, [12, 24]), (8, [6, 12, 24]), (16, [3, 6, 12, 24])])
def test_every_convolution_halves_the_image_and_the_last_has_all_channels(patch: int, channels: list[int]) -> None:
    stem = ConvStem(3, 24, patch)
    assert stem(torch.randn(2, 3, 32, 64)).shape == (2, 24, 32 // patch, 64 // patch)
    convolutions = [each for each in stem if isinstance(each, nn.Conv2d)]
    assert [each.out_channels for each in convolutions] == channels
    inputs = [3, *channels[:-1]]
    expected = sum(9 * i * o + 2 * o for i, o in zip(inputs, channels, strict=True))
    assert sum(each.numel() for each in stem.parameters()) == expected
    biased = ConvStem(3, 24, patch, StemConfig(norm=False))
    assert not any(isinstance(each, nn.BatchNorm2d) for each in biased)


def test_a_token_sees_pixels_beyond_its_patch() -> None:
    """Count the 7x7 pixels that two convolutions of stride 2 read, from 3 above and left of a patch of 4."""
    stem = ConvStem(1, 8, 4).eval()
    image = torch.zeros(1, 1, 32, 32, requires_grad=True)
    stem(image)[0, :, 4, 4].sum().backward()
    rows = image.grad[0, 0].abs().sum(dim=1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (16 - 3, 16 + 3)


def test_shifting_an_image_by_a_patch_shifts_the_tokens() -> None:
    stem = ConvStem(3, 8, 4).eval()
    image = torch.randn(1, 3, 32, 32)
    tokens, shifted = stem(image), stem(image.roll((4, 8), (2, 3)))
    torch.testing.assert_close(shifted[:, :, 2:, 3:], tokens[:, :, 1:-1, 1:-2])


def test_patching_replaces_the_patch_embedding_and_unpatching_restores_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    images = torch.randn(2, 3, 32, 32)
    before = model.eval()(images)
    smallvit.patch(model, stem=True, lsa=True)
    assert isinstance(model.patch_embed.proj, ConvStem)
    assert model(images).shape == before.shape
    with pytest.raises(ValueError, match="patch"):
        model.set_input_size(patch_size=8)
    smallvit.unpatch(model)
    torch.testing.assert_close(model(images), before)


def test_stem_and_spt_exclude_each_other() -> None:
    model = smallvit.create_model("vit96", img_size=32, num_classes=5)
    with pytest.raises(ValueError, match="cannot be combined with shifted patch tokenization"):
        smallvit.patch(model, spt=True, stem=True)
    smallvit.patch(model, spt=True)
    with pytest.raises(ValueError, match="cannot be combined with shifted patch tokenization"):
        smallvit.patch(model, stem=True)
    with pytest.raises(InputError, match="--stem cannot be combined with --spt"):
        smallvit.Config.build(spt=True, stem=True)


def test_embeddings_that_do_not_fit_are_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=30, patch_size=6, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(UnsupportedModelError, match="6x6 pixels are not square with sides of 2, 4, 8 or 16"):
        smallvit.patch(model, stem=True)
    with pytest.raises(UnsupportedModelError, match="use init='paper'"):
        smallvit.patch(smallvit.create_model("vit96", img_size=32, num_classes=5), init="preserve", stem=True)
