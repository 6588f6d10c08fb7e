"""Test `create_model`."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from smallvit.models.factory import create_model, default_patch_size
from smallvit.profiling.flops import count_macs, count_parameters
from smallvit.utils.errors import InputError


@pytest.mark.parametrize(
    ("img_size", "classes", "plugins", "parameters", "exact"),
    [  # arXiv:2112.13492, its official code: exact at 32 px, in millions at 64 px
        (32, 10, False, 2_692_426, True),
        (32, 10, True, 2_729_878, True),
        (64, 200, False, 2.757e6, False),
        (64, 200, True, 2.906e6, False),
    ],
)
def test_vit_has_the_papers_parameters(
    img_size: int, classes: int, plugins: bool, parameters: float, exact: bool
) -> None:
    model = create_model("vit", img_size=img_size, num_classes=classes, plugins={"spt": plugins, "lsa": plugins})
    assert count_parameters(model) == pytest.approx(parameters, abs=0 if exact else 500)


def test_vit_has_the_papers_macs() -> None:
    assert count_macs(create_model("vit", img_size=64, num_classes=200), 3, 64) / 1e6 == pytest.approx(189.8, rel=0.01)


def test_vit_starts_from_the_papers_initial_values() -> None:
    torch.manual_seed(0)
    model = create_model("vit", img_size=32, num_classes=10)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 10_000:
            fan_out, fan_in = module.weight.shape
            assert module.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.03), name
        if getattr(module, "bias", None) is not None:
            assert module.bias.eq(0).all(), name
    assert model.pos_embed.std().item() == pytest.approx(1, rel=0.05)


def test_vit_drops_paths_equally_in_every_block() -> None:
    def rates(**arguments: float) -> list[float]:
        model = create_model("vit", img_size=32, num_classes=10, **arguments)
        return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]

    assert rates() == [0.1] * 18
    assert rates(drop_path_rate=0.3) == [0.3] * 18


@pytest.mark.parametrize(
    ("arch", "img_size", "patch"),
    [
        ("vit", 32, 4),
        ("vit", 28, 4),
        ("vit", 64, 8),
        ("vit", 96, 8),
        ("vit", 224, 16),
        ("vit", 8, 2),
        ("vit", 4, 1),
        ("vit_small_patch16_224", 32, 4),
        ("vit_small_patch16_224", 224, 16),
        ("vit_base_patch32_224", 224, 32),
        ("deit_tiny_patch16_224", 64, 8),
        ("swin_tiny_patch4_window7_224", 32, 2),
        ("swin_tiny_patch4_window7_224", 64, 4),
        ("swin_tiny_patch4_window7_224", 224, None),
        ("pit_ti_224", 32, 2),
        ("resnet18", 32, None),
    ],
)
def test_the_patch_follows_the_image_size(arch: str, img_size: int, patch: int | None) -> None:
    assert default_patch_size(arch, img_size) == patch


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "cait_xxs24_224",
        "pit_ti_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "resnet18",
        "convnext_atto",
    ],
)
@pytest.mark.parametrize("img_size", [32, 64])
def test_timm_models_take_small_images(arch: str, img_size: int) -> None:
    model = create_model(arch, img_size=img_size, num_classes=7, in_chans=1).eval()
    assert model(torch.zeros(2, 1, img_size, img_size)).shape == (2, 7)


def test_a_timm_name_is_timms_own_model_at_its_own_size() -> None:
    ours = create_model("vit_tiny_patch16_224", img_size=224, num_classes=10)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 224, 224)
    assert torch.equal(ours.eval()(image), theirs.eval()(image))


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("vti", {}, "'vit'"),
        ("resnet8", {}, "did you mean"),
        ("resnet57", {}, "did you mean 'resnet56'"),
        ("vit_base_patch16_224_in21k", {}, "no such architecture"),  # a deprecated alias
        ("vit_tiny_patch16_224.augreg_in21k", {}, "train vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.nonsense", {}, "give --init vit_tiny_patch16_224.nonsense"),
        ("gcvit_tiny", {"img_size": 8}, "cannot be created for 8-pixel images"),
        ("resnet18", {"patch_size": 7}, "--patch-size 7: resnet18 has no patch size"),
        ("vit", {"img_size": 30}, "--img-size 30 is not a multiple of the patch size 4; use 28 or 32"),
        ("vit", {"patch_size": 5}, "use 30 or 35"),
        ("vit_tiny_patch16_224", {"img_size": 33}, "use 32 or 36"),
        ("vit", {"patch_size": 64}, "use 64, or a smaller --patch-size"),
        ("resnet18+spt", {}, "--arch resnet18: cannot patch this ResNet with shifted patch tokenization"),
        ("t2t+spt", {"init": "preserve"}, "TokenTransformer (it normalizes all views together; use init='paper')"),
        ("vit+stp", {}, "no such plugin as 'stp' (did you mean 'spt'?)"),
        ("vit", {"plugins": {"spt": {"shift": 2.0}}}, "--spt-shift 2.0: expected a fraction of the patch"),
        ("t2t", {"patch_size": 1}, "t2t expects a power of 2, at least 2"),
        ("vgg11", {"drop_path_rate": 0.1}, "--arch vgg11 cannot be created"),
    ],
)
def test_invalid_arguments_are_refused(arch: str, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        create_model(arch, **{"img_size": 32, "num_classes": 10} | options)
    assert message in str(caught.value)


def test_counting_macs_refuses_images_that_the_model_cannot_take() -> None:
    with pytest.raises(InputError, match="8-pixel images"):
        count_macs(create_model("convnext_atto", img_size=8, num_classes=10, fit=False), 3, 8)


@pytest.mark.parametrize(
    "arch", ["vit", "cait", "pit", "swin", "t2t", "deit_tiny_patch16_224", "swinv2_tiny_window8_256"]
)
def test_dropout_acts_on_projections_and_mlps_but_not_on_attention_maps(arch: str) -> None:
    model = create_model(arch, img_size=32, num_classes=3, dropout=0.25)
    rates: dict[str, set[float]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Dropout):
            rates.setdefault(name.rpartition(".")[2], set()).add(layer.p)
    assert rates["proj_drop"] == rates["drop1"] == rates["drop2"] == {0.25}
    assert rates.get("attn_drop", {0.0}) == {0.0}


def test_dropout_for_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"--dropout 0\.1: resnet18 has no dropout layers"):
        create_model("resnet18", img_size=32, num_classes=3, dropout=0.1)
